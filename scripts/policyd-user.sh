#!/bin/sh
# policyd-user.sh: why is she blocked, and until when?  All that policyd knows
# of one login: quota, sum, the last 24 hours hour by hour, where her mail came
# from, when she may send again; and, if told to, a clean slate for her.
#
# Reads policyd's settings file, and from there MariaDB or the embedded store.
# Writes nothing but with --forgive --yes.
#
# Needs policyd-common.sh and policyd-held.sh beside it; the first says what it
# needs.  Run it as root: the hold queue is shown to nobody else.

set -eu

common=$(readlink -f -- "$0")
common=${common%/*}/policyd-common.sh
if [ ! -r "$common" ]; then
    echo "${0##*/}: $common is missing; install it beside this script" >&2
    exit 1
fi
# shellcheck source=scripts/policyd-common.sh
. "$common"

usage() {
    cat <<EOF
Usage: ${0##*/} [-c FILE] LOGIN
       ${0##*/} [-c FILE] LOGIN --forgive [--yes]

Print what policyd knows of a login's last 24 hours: its quota and where that
comes from, sum and state, recipients hour by hour, client addresses and
senders, held messages, and when the sum is below the quota again.

  --forgive  say what forgiving would do: the recipients of the last 24 hours
             become 0, and the login may send again at once.  Held messages
             stay held (policyd-held.sh releases or deletes them)
  --yes      and do it
  -c FILE    policyd's settings file (default: $settings)
  -h         print this help

LOGIN is taken as policyd counts it: in lower case (type letters beyond ASCII
so), and cut at its @ unless strip_domain=no.

Example: ${0##*/} boris --forgive
EOF
}

# ---- the command line: options before or after the login --------------------

user=
forgive=no
yes=no
while [ $# -gt 0 ]; do
    case $1 in
    -c)
        [ $# -gt 1 ] || wrong_call
        settings=$2 given=yes
        shift
        ;;
    -c?*) settings=${1#-c} given=yes ;;
    -h)
        usage
        exit 0
        ;;
    --forgive) forgive=yes ;;
    --yes) yes=yes ;;
    --)
        shift
        if [ $# -ne 1 ] || [ -n "$user" ]; then
            wrong_call
        fi
        user=$1
        ;;
    -*) wrong_call ;;
    *)
        [ -z "$user" ] || wrong_call
        user=$1
        ;;
    esac
    shift
done
if [ -z "$user" ] || { [ "$yes" = yes ] && [ "$forgive" = no ]; }; then
    wrong_call
fi

read_settings
connect
login_of "$user"
hex=$(to_hex "$login")
shown=$(printf '%s\n' "$login" | awk "$awk_common"'{ print printable($0) }')

# ---- who is she? ------------------------------------------------------------

# In SQL the login stands in hexadecimal only.
stored=$(stored_login "$hex")
hers="$login_column = $stored"
today="$hers AND ts > $(ago 86400)"

ask "SELECT 'her', HEX($stored), COUNT(*),
        COALESCE(SUM(CASE WHEN ts > $(ago 86400) THEN recipient_count END), 0),
        COALESCE(SUM(ts > $(ago 86400)), 0),
        COALESCE(SUM(ts > $(ago 86400) AND recipient_count > 0), 0),
        $(moment 'MAX(ts)')
    FROM $table WHERE $hers"
IFS=$tab read -r _ stored events sum messages forgivable last <<EOF
her${answer##*her}
EOF
case $hex in
"$stored"*) ;;
*) die "$shown: a login is UTF-8" ;;
esac
if [ "$events" -eq 0 ]; then
    die "$shown: unknown; no message of this login is kept in $where"
fi

# ---- forgiving --------------------------------------------------------------

if [ "$forgive" = yes ]; then
    if [ "$stored" != "$hex" ]; then
        printf 'This table cuts logins to %s characters: all that begin so are meant.\n' "$width"
    fi
    if [ "$yes" = no ]; then
        printf '%s: %s events of the last 24 hours, %s recipients, would be set to 0\nsum: %s -> 0\n' \
            "$shown" "$forgivable" "$sum" "$sum"
        echo 'Nothing was changed; add --yes to do it.'
        exit 0
    fi
    # ts = ts: go-policyd's table would move it.
    what="UPDATE $table SET recipient_count = 0, ts = ts WHERE $today AND recipient_count > 0"
    change "$what; SELECT 'forgiven', ROW_COUNT()" "$what; SELECT 'forgiven', changes()"
    forgiven=${answer##*forgiven"$tab"}
    ask "SELECT 'sum', COALESCE(SUM(recipient_count), 0) FROM $table WHERE $today"
    printf '%s: %s events of the last 24 hours were set to 0\nsum: %s -> %s\n' \
        "$shown" "$forgiven" "$sum" "${answer##*sum"$tab"}"
    exit 0
fi

# ---- her limits -------------------------------------------------------------

# shellcheck disable=SC2016 # awk's own dollars
limits=$({
    settings_rows
    printf 'her\t%s\t%s\n' "$stored" "$sum"
} | awk "$awk_common"'
    $1 == "her" {
        limits_of($2)
        print number(quota), number(reject), quota_line, hour_quota == "" ? "none" : hour_quota, state_of($3)
    }')
read -r quota reject quota_line hour_quota state <<EOF
$limits
EOF
case $hour_quota$quota in
noneunlimited) hour_quota=0 ;;
none*) hour_quota=$hourquota ;;
esac
case $quota_line$defaultquota_line in
0) quota_from="policyd's default" ;;
0*) quota_from="$settings:$defaultquota_line defaultquota=" ;;
*) quota_from="$settings:$quota_line quota=" ;;
esac
case $quota_line$rejectquota_line in
0?*) reject_from="$settings:$rejectquota_line rejectquota=" ;;
*) reject_from='twice the quota' ;;
esac

# ---- what she did -----------------------------------------------------------

falls() { # KIND LIMIT: when what is left of the sum will be below LIMIT
    if [ "$2" = unlimited ] || [ "$2" -eq 0 ] || [ "$sum" -lt "$2" ]; then
        return
    fi
    cat <<EOF
SELECT '$1', $(moment "$(day_after 'MIN(ts)')") FROM
    (SELECT ts, SUM(COALESCE(recipient_count, 0)) OVER () -
            SUM(COALESCE(recipient_count, 0)) OVER (ORDER BY ts) AS later
        FROM $table WHERE $today) AS events
    WHERE later < $2;
EOF
}

top() { # KIND COLUMN: the ten with the most recipients, and how many there are
    cat <<EOF
SELECT '$1', $(in_hex "$2") AS name, COUNT(*) AS messages, COALESCE(SUM(recipient_count), 0) AS recipients,
        $(moment 'MIN(ts)'), $(moment 'MAX(ts)')
    FROM $table WHERE $today GROUP BY name ORDER BY recipients DESC, messages DESC, name LIMIT 10;
SELECT '$1s', COUNT(DISTINCT $(in_hex "$2")) FROM $table WHERE $today;
EOF
}

# 24 hours, the last of which ends now; a time in the future counts in that one.
ask "WITH RECURSIVE hours (age) AS (SELECT 0 UNION ALL SELECT age + 1 FROM hours WHERE age < 23)
    SELECT 'hour', $(moment "$(ago '((hours.age + 1) * 3600)')"), COALESCE(recipients, 0)
        FROM hours LEFT JOIN (
            SELECT CASE WHEN ts > $(ago 0) THEN 0 ELSE $(hours_since ts) END AS age, SUM(recipient_count) AS recipients
            FROM $table WHERE $today GROUP BY 1) AS counted ON counted.age = hours.age
        ORDER BY hours.age DESC;
    SELECT 'last_hour', COALESCE(SUM(recipient_count), 0) FROM $table WHERE $today AND ts > $(ago 3600);
    SELECT DISTINCT 'address', $(in_hex client_address) FROM $table
        WHERE $hers AND ts > $(ago "$networks_window_s") AND recipient_count > 0;
    $(falls falls "$quota") $(falls falls_reject "$reject")
    $(top client client_address) $(top sender sender)"

# ---- the report -------------------------------------------------------------

colours
# shellcheck disable=SC2016 # awk's own dollars
{
    printf 'from\t%s\t%s\n' "$quota_from" "$reject_from"
    printf 'sum\t%s\t%s\t%s\t%s\t%s\t%s\n' "$sum" "$messages" "$last" "$quota" "$reject" "$state"
    printf '%s' "$blacklist" | sed "s/^/blacklist$tab/"
    printf '%s' "$trusted_networks" | sed "s/^/trusted$tab/"
    printf '%s\n' "$answer"
} | awk -v settings_mode="$mode" -v hour_quota="$hour_quota" -v max_networks="$max_networks" \
    -v networks_window="$networks_window" -v red="$red" -v yellow="$yellow" -v plain="$plain" \
    -v cut_at="$(if [ "$stored" = "$hex" ]; then echo 0; else echo "$width"; fi)" \
    -v her="$hex" "$awk_common"'
    # An address as its 32 or 128 bits, "" for what is none.
    function binary(value, digits,    text) {
        while (digits-- > 0) {
            text = value % 2 text
            value = int(value / 2)
        }
        return text
    }
    function bits(address,    part, count, i, j, value, text) {
        if (address ~ /^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$/) {
            split(address, part, ".")
            return binary(part[1], 8) binary(part[2], 8) binary(part[3], 8) binary(part[4], 8)
        }
        address = tolower(address)
        if (address !~ /^[0-9a-f:]*:[0-9a-f:]*$/)
            return ""
        sub(/^::/, "0::", address)
        sub(/::$/, "::0", address)
        count = split(address, part, ":")
        for (i = 1; i <= count; i++) {
            if (part[i] == "") {
                text = text binary(0, 16 * (9 - count))
                continue
            }
            value = 0
            for (j = 1; j <= length(part[i]); j++)
                value = value * 16 + index("0123456789abcdef", substr(part[i], j, 1)) - 1
            text = text binary(value, 16)
        }
        return length(text) == 128 ? text : ""
    }
    function is_trusted(address,    network) {
        for (network in trusted)
            if (length(address) == trusted[network] && substr(address, 1, length(network)) == network)
                return 1
        return 0
    }
    function row(name, text) {
        printf "%-13s %s\n", name, text
    }
    function table(kind,    i, name, field) {
        printf "\n%-48s %8s %10s %5s %5s\n", kind, "messages", "recipients", "first", "last"
        for (i = 1; i <= rows[kind]; i++) {
            split(line[kind, i], field, FS)
            name = field[2] == "" ? "<>" : fit(shown(field[2]), 48)
            printf "%-48s %8s %10s %5s %5s\n", name, field[3], field[4], substr(field[5], 12, 5), substr(field[6], 12, 5)
        }
        if (all[kind] > rows[kind])
            print "and " all[kind] - rows[kind] " more"
    }
    $1 == "from" { quota_from = printable($2); reject_from = printable($3) }
    $1 == "sum" { sum = $2; messages = $3; last = $4; quota = $5; reject = $6; state = $7 }
    $1 == "blacklist" && to_hex(tolower($3)) == her { blacklisted = $2 }
    $1 == "trusted" {
        split($2, part, "/")
        address = bits(part[1])
        trusted[part[2] == "" ? address : substr(address, 1, part[2])] = length(address)
    }
    $1 == "address" {
        address = bits(shown($2))
        network = substr(address, 1, length(address) == 32 ? 24 : 48)
        if (address != "" && !is_trusted(address) && !(network in seen)) {
            seen[network] = 1
            networks++
        }
    }
    $1 == "hour" {
        time[++hours] = substr($2, 12, 5)
        recipients[hours] = $3
        if ($3 > most)
            most = $3 + 0
    }
    $1 == "last_hour" { last_hour = $2 }
    $1 == "falls" || $1 == "falls_reject" { falls[$1] = $2 }
    $1 == "client" || $1 == "sender" { line[$1, ++rows[$1]] = $0 }
    $1 == "clients" || $1 == "senders" { all[substr($1, 1, 6)] = $2 }
    END {
        row("login", shown(her))
        if (cut_at)
            row("", "cut to " cut_at " characters in the table: all that begin so are one")
        means["ok"] = "ok: messages go on"
        means["HOLD"] = yellow "HOLD: messages are held" plain
        means["REJECT"] = red "REJECT: messages are refused" plain
        if (state != "ok")
            reason[++reasons] = means[state]
        if (blacklisted)
            reason[++reasons] = yellow "HOLD" plain ": on the blacklist, line " blacklisted " of the settings"
        if (hour_quota > 0 && last_hour + 0 >= hour_quota + 0)
            reason[++reasons] = yellow "HOLD" plain ": the hour quota is reached"
        if (max_networks > 0 && networks > max_networks)
            reason[++reasons] = yellow "HOLD" plain ": comes from too many networks"
        row("state", reasons ? reason[1] : means["ok"])
        for (i = 2; i <= reasons; i++)
            row("", reason[i])
        if (settings_mode == "audit")
            row("", "but nothing is held or refused: mode=audit")
        if (quota == "unlimited")
            row("quota", "unlimited: never held or refused for the sum")
        else if (quota == 0)
            row("quota", "0: each message is held")
        else
            row("quota", quota " recipients in 24 hours")
        row("", "(" quota_from ")")
        if (reject != "unlimited")
            row("refused from", reject " (" reject_from ")")
        row("sum now", sum " recipients, " messages " messages" \
            (quota + 0 > 0 ? ", " int(sum * 100 / quota) "% of the quota" : ""))
        if ("falls_reject" in falls)
            row("refused until", falls["falls_reject"] ", then held, if nothing more is sent")
        if ("falls" in falls)
            row("held until", falls["falls"] ", if nothing more is sent")
        if (hour_quota > 0)
            row("last hour", last_hour " recipients of an hour quota of " hour_quota)
        if (max_networks > 0)
            row("networks", networks + 0 " in " networks_window "; more than " max_networks " are held")
        row("last message", last)
        if (messages == 0)
            exit
        print "\nrecipients of the last 24 hours; each line is the hour from that time on"
        for (i = 1; i <= hours; i++) {
            bar = recipients[i] > 0 ? "#" : ""
            while (length(bar) < int(recipients[i] * 60 / (most + 1)))
                bar = bar "#"
            printf "%5s %9s%s\n", time[i], recipients[i], (bar == "" ? "" : "  ") bar
        }
        table("client")
        table("sender")
    }'

# ---- held messages ----------------------------------------------------------

echo
echo 'held messages'
if [ "$given" = yes ] || [ -e "$settings" ]; then
    set -- -c "$settings"
else
    set --
fi
if ! held=$("${common%/*}/policyd-held.sh" "$@" -- "$login" 2>&1); then
    held="not known: $(printf '%s' "${held#policyd-held.sh: }" | tr '\n' ' ' | tr -c '[:print:]' '?')"
fi
printf '%s\n' "$held"
