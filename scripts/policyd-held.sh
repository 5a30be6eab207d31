#!/bin/sh
# policyd-held.sh: whose mail waits in Postfix's hold queue, and what becomes of
# it; for the postmaster.
#
# A message belongs to the login in its own queue file (sasl_username), which
# Postfix wrote there when the client had signed in.  What is on hold without a
# login was put there by somebody else: it is listed, and never touched.
#
# Needs policyd-common.sh beside it, Postfix 3.1 or newer, awk, sed, sort, tr.
# Run it as root.  MAIL_CONFIG chooses another instance of Postfix, as always.

set -eu

common=$(readlink -f -- "$0")
common=${common%/*}/policyd-common.sh
if [ ! -r "$common" ]; then
    echo "${0##*/}: $common is missing; install it beside this script" >&2
    exit 1
fi
# shellcheck source=scripts/policyd-common.sh
. "$common"

few=10      # messages of a login in the list of all
at_once=100 # messages in one call of postcat

usage() {
    cat <<EOF
Usage: ${0##*/} [-c FILE] [LOGIN...]
       ${0##*/} [-c FILE] release LOGIN|QUEUE_ID... [--yes]
       ${0##*/} [-c FILE] delete  LOGIN|QUEUE_ID... [--yes]

List the messages in Postfix's hold queue by login, or all those of LOGIN.

  release  let messages go: all of a login, or one by its queue id
  delete   delete them for good
  --yes    do it; without it you only see which messages it would be
  -c FILE  policyd's settings file (default: $settings)
  --       before a LOGIN to list that reads like a command or an option
  -h       print this help

A message on hold without a login was put there by somebody else than policyd:
it is listed and never touched.

Example: the wave came from boris, but one message was honest.

  ${0##*/} boris
  ${0##*/} release 4Xk1b12rTnz3xT --yes
  ${0##*/} delete boris --yes
EOF
}

# ---- what is on hold --------------------------------------------------------

# Of postqueue's lines, one JSON object for each message: held, arrival, queue
# id, size, recipients, sender.  A client may send from any address, but a
# quotation mark in it has a backslash before it, and what precedes it in the
# line is Postfix's own.
# shellcheck disable=SC2016 # awk's own dollars
read_queue='
    function byte_of(hex) {
        hex = toupper(hex)
        return sprintf("%c", (index(digits, substr(hex, 1, 1)) - 1) * 16 + index(digits, substr(hex, 2)) - 1)
    }
    function unescaped(text,    at, kind, done) {
        while ((at = index(text, "\\"))) {
            done = done substr(text, 1, at - 1)
            kind = substr(text, at + 1, 1)
            if (kind == "u") {  # Postfix escapes only bytes so
                done = done byte_of(substr(text, at + 4, 2))
                at += 4
            } else
                done = done (kind in control ? control[kind] : kind)
            text = substr(text, at + 2)
        }
        return done text
    }
    BEGIN {
        digits = "0123456789ABCDEF"
        control["b"] = "\b"; control["f"] = "\f"; control["n"] = "\n"; control["r"] = "\r"; control["t"] = "\t"
        start = "^[{]\"queue_name\": \"hold\", \"queue_id\": \"[0-9A-Za-z]+\", \"arrival_time\": [0-9]+, "
        start = start "\"message_size\": [0-9]+, (\"[a-z_]+\": [a-z0-9]+, )*\"sender\": \""
    }
    !/^[{]"queue_name": "/ { exit failed = 1 }
    !/^[{]"queue_name": "hold", / { next }
    !match($0, start) { exit failed = 1 }
    {
        split(substr($0, 1, RLENGTH), member, /[":, ]+/)  # "{", then names and values
        rest = substr($0, RLENGTH + 1)
        if (!match(rest, /^([^"\\]|\\.)*"/))
            exit failed = 1
        sender = printable(unescaped(substr(rest, 1, RLENGTH - 1)))
        rest = substr(rest, RLENGTH + 1)
        print "held", member[7], member[5], member[9], gsub(/[{]"address": "/, "", rest), sender
    }
    END { exit failed }
'

# Of what postcat shows, one line for each message: envelope, queue/id, time,
# login.  Only the start of an envelope counts, which Postfix alone has written:
# further down there may be lines of the client, the original recipient (RFC
# 3461) may hold a line end.
# shellcheck disable=SC2016
read_envelopes='
    function finish() {
        if (path != "")
            print "envelope\t" path "\t" time "\t" login
        path = time = login = ""
    }
    $0 == "failed" { finish(); print }
    /^\*\*\* ENVELOPE RECORDS / {
        finish()
        path = $4
        at_start = 1
        next
    }
    !/^(message_[a-z_]+|create_time|content_filter|named_attribute): / { at_start = 0 }
    at_start && /^message_arrival_time: / {
        month = (index("JanFebMarAprMayJunJulAugSepOctNovDec", $3) + 2) / 3
        time = sprintf("%s-%02d-%02d %s", $6, month, $4, substr($5, 1, 5))
    }
    at_start && /^named_attribute: sasl_username=/ && login == "" { login = substr($0, index($0, "=") + 1) }
    END { finish() }
'

on_hold() { # prints a line for each message in the hold queue
    { postqueue -j 2>/dev/null || echo failed; } | awk -v OFS="$tab" "$awk_common$read_queue" || {
        reason=$(postqueue -j 2>&1 >/dev/null) || die "$reason"
        die 'postqueue -j does not say what this script understands'
    }
}

ids_of() { # LINES: prints their queue ids
    printf '%s\n' "$1" | awk -F "$tab" '{ print $3 }'
}

open_messages() { # QUEUE_ID...
    { postcat -eq "$@" 2>/dev/null || echo failed; } | awk "$read_envelopes"
}

envelopes() { # QUEUE_ID...: prints a line for each that is still there
    lines=$(open_messages "$@")
    if [ "${lines##*"$newline"}" != failed ] && [ "$(printf '%s\n' "$lines" | wc -l)" -eq $# ]; then
        printf '%s\n' "$lines"
        return
    fi
    # Not one line for each: one of them went away meanwhile, at which postcat
    # stops, or has a forged start.  Alone, the first start is the true one.
    now=$(on_hold) || exit
    now=$newline$(ids_of "$now")$newline
    for id; do
        case $now in
        *"$newline$id$newline"*) ;;
        *) continue ;; # postcat would search for it for a second
        esac
        line=$(open_messages "$id" | sed 1q)
        if [ "$line" != failed ]; then
            printf '%s\n' "$line"
            continue
        fi
        reason=$(postcat -eq "$id" 2>&1 >/dev/null) || case $reason in
        *'No such file or directory'*) ;;
        *) die "$reason" ;;
        esac
    done
}

all_envelopes() { # of $queue
    set --
    for queue_id in $(ids_of "$queue"); do
        set -- "$@" "$queue_id"
        if [ $# -eq $at_once ]; then
            envelopes "$@"
            set --
        fi
    done
    if [ $# -gt 0 ]; then
        envelopes "$@"
    fi
}

# The account that a sasl_username or a LOGIN stands for, as login_of has it.
# shellcheck disable=SC2016
account='
    function account(login,    at) {
        login = tolower(login)
        if (strip_domain == "yes" && (at = index(login, "@")) > 1)
            login = substr(login, 1, at - 1)
        sub(/ +$/, "", login)
        return to_hex(login)
    }
'

find_messages() { # sets $messages to lines, the oldest first, of
    # message, arrival, id, time, size, recipients, login (hexadecimal), sender
    messages=
    queue=$(on_hold)
    if [ -z "$queue" ]; then
        return
    fi
    envelopes=$(all_envelopes)
    # What has no envelope is on hold no more.
    messages=$(printf '%s\n%s\n' "$queue" "$envelopes" |
        awk -v OFS="$tab" -v strip_domain="$strip_domain" "$awk_common$account"'
            $1 == "held" { held["hold/" $3] = $0 }
            $1 == "envelope" && $2 in held {
                split(held[$2], fact)
                login = account(substr($0, length($1 $2 $3) + 4))
                print "message", fact[2], fact[3], $3, fact[4], fact[5], login, fact[6]
                delete held[$2]
            }' | sort -t "$tab" -k 2,2n -k 3,3)
}

# ---- the tables -------------------------------------------------------------

show() { # MESSAGES [FEW]: all of each login; or a summary, and FEW of each
    printf '%s\n' "$1" | awk -v few="${2-0}" -v script="${0##*/}" "$awk_common"'
        function name(login) {
            return login == "" ? "(no login)" : shown(login)
        }
        function count(n, noun) {
            return n + 0 " " noun (n == 1 ? "" : "s")
        }
        function size(bytes) {
            return bytes < 10000 ? bytes : bytes < 10240000 ? int(bytes / 1024) "k" : int(bytes / 1048576) "M"
        }
        function comes_before(one, other) {  # most recipients first, no login last
            if (one == "" || other == "")
                return other == ""
            return recipients[one] > recipients[other]
        }
        $1 == "nothing" { nothing = nothing "\n" $2 ": nothing is held\n" }
        $1 == "message" {
            if (!($7 in messages)) {
                order[++logins] = $7
                since[$7] = $4
            }
            line[$7, ++messages[$7]] = $0
            recipients[$7] += $6
            all_messages++
            all_recipients += $6
            if (length($3) > width)
                width = length($3)
        }
        END {
            for (i = 2; i <= logins; i++)
                for (j = i; j > 1 && comes_before(order[j], order[j - 1]); j--) {
                    login = order[j]
                    order[j] = order[j - 1]
                    order[j - 1] = login
                }
            if (few) {
                print "On hold: " count(all_messages, "message") ", " count(all_recipients, "recipient") "\n"
                printf "%8s  %10s  %-16s  %s\n", "messages", "recipients", "since", "login"
                for (i = 1; i <= logins; i++) {
                    login = order[i]
                    printf "%8d  %10d  %16s  %s\n", messages[login], recipients[login], since[login], fit(name(login), 40)
                }
                print ""
            }
            if (width < 8)
                width = 8
            format = "%-" width "s  %-16s  %5s  %6s  %s\n"
            for (i = 1; i <= logins; i++) {
                login = order[i]
                print (i > 1 ? "\n" : "") name(login) ": " count(messages[login], "message") ", " \
                    count(recipients[login], "recipient") (login == "" ? ", not held by policyd; never touched" : "")
                printf format, "queue id", "arrived", "size", "rcpts", "sender"
                last = few && messages[login] > few ? few : messages[login]
                for (j = 1; j <= last; j++) {
                    split(line[login, j], fact)
                    printf format, fact[3], fact[4], size(fact[5]), fact[6], fit(fact[8], 45 - width)
                }
                if (last < messages[login])
                    print "... and " messages[login] - last " more" (login == "" ? "" : "; " script " LOGIN shows all")
            }
            printf "%s", nothing
        }'
}

# ---- which of them ----------------------------------------------------------

choose() { # sets $chosen: the lines of $messages that $arguments name; dies if one names none
    # In a list that is no mistake: there it becomes a line of its own.
    chosen=$(printf '%s%s\n' "$arguments" "$messages" |
        awk -v command="$command" -v strip_domain="$strip_domain" "$awk_common$account"'
            function refuse(reason) {
                print "refused\t" reason
                exit
            }
            $1 == "argument" { argument[++arguments] = substr($0, 10) }
            $1 == "message" {
                message[++messages] = $0
                owner[messages] = $7
                id[messages] = $3
                owner_of_id[$3] = $7
                if ($7 != "")
                    has_messages[$7] = 1
            }
            END {
                for (i = 1; i <= arguments; i++) {
                    name = argument[i]
                    by_login = account(name) in has_messages
                    by_id = command != "list" && name in owner_of_id
                    if (by_login && by_id)
                        refuse(name " is a login and the queue id of a held message too; nothing was changed: use postsuper")
                    if (by_id && owner_of_id[name] == "")
                        refuse(name " has no login, it was not policyd that held it; nothing was changed: use postsuper")
                    if (by_id)
                        wanted_id[name] = 1
                    else if (by_login)
                        wanted_login[account(name)] = 1
                    else if (command != "list")
                        refuse(printable(name) ": no login and no queue id of a held message; nothing was changed")
                    else if (arguments > 1)
                        print "nothing\t" printable(name)
                }
                for (i = 1; i <= messages; i++)
                    if (id[i] in wanted_id || owner[i] in wanted_login)
                        print message[i]
            }')
    case $chosen in
    "refused$tab"*) die "${chosen#*"$tab"}" ;;
    esac
}

list() {
    if [ -n "$arguments" ]; then
        choose
        few=0
    else
        chosen=$messages
    fi
    case $chosen in
    *"message$tab"*) show "$chosen" "$few" ;;
    *) echo 'nothing is held' ;;
    esac
}

count() { # NUMBER
    if [ "$1" -eq 1 ]; then echo '1 message'; else echo "$1 messages"; fi
}

act() { # -H or -d, for postsuper
    choose
    number=$(printf '%s\n' "$chosen" | wc -l)
    if [ "$yes" = no ]; then
        printf 'Would %s %s:\n\n' "$command" "$(count "$number")"
        show "$chosen"
        printf '\nNothing was changed; to do it, add --yes\n'
        return
    fi
    # In the hold queue only: what has left it meanwhile is not ours any more.
    answer=$(ids_of "$chosen" | postsuper "$1" - hold 2>&1) ||
        die "${answer##*"$newline"}; ${0##*/} shows what is left"
    # "postsuper: Deleted: 2 messages"
    acted=$(printf '%s\n' "$answer" | sed -n 's/^postsuper: [A-Z][a-z ]*: \([0-9][0-9]*\) messages*$/\1/p')
    echo "${command}d $(count "${acted:-0}")"
    if [ "${acted:-0}" -lt "$number" ]; then
        echo "$(count $((number - ${acted:-0}))) had left the hold queue before"
    fi
    if [ "$command" = release ]; then
        echo 'Postfix delivers at its next queue run, in some minutes; postqueue -f: now'
    fi
}

# ---- main -------------------------------------------------------------------

while getopts c:h option; do
    case $option in
    c) settings=$OPTARG given=yes ;;
    h)
        usage
        exit 0
        ;;
    *) wrong_call ;;
    esac
done
only_logins=no
if [ "$OPTIND" -gt 1 ]; then
    shift $((OPTIND - 2))
    if [ "$1" = -- ]; then
        only_logins=yes
    fi
    shift
fi

command=list yes=no arguments=
case $only_logins:${1-} in
no:release | no:delete)
    command=$1
    shift
    ;;
esac
for argument; do
    case $only_logins:$argument in
    no:--yes) yes=yes ;;
    no:--) only_logins=yes ;;
    no: | yes: | no:-*) wrong_call ;;
    *"$newline"*) die 'a line end is in no login and in no queue id' ;;
    *) arguments="${arguments}argument$tab$argument$newline" ;;
    esac
done
case $command:$yes:$arguments in
list:yes:* | release:*: | delete:*:) wrong_call ;;
esac

if [ "$(id -u)" -ne 0 ]; then
    die 'only root may look into the hold queue; run this as root'
fi
PATH=$PATH:/usr/sbin:/sbin # which a plain su leaves out
for program in postqueue postcat postsuper; do
    command -v "$program" >/dev/null || die "$program is not installed: no Postfix on this machine?"
done
read_settings
find_messages

case $command in
list) list ;;
release) act -H ;;
delete) act -d ;;
esac
