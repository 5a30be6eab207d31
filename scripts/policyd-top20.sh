#!/bin/sh
# policyd-top20.sh: who sends the most?  The twenty logins with the most
# recipients of the last 24 hours, or of the last 7 days; for the postmaster.
#
# Reads policyd's settings file, and from there MariaDB or the embedded store;
# writes to neither.  Held and refused messages count too, as they do in
# policyd.  A message is a row of the table: in MariaDB two from one login,
# sender and address in the same millisecond share a row, and show as one.
#
# Needs awk, sed, tr, and one of
#   mariadb or mysql   (Debian package mariadb-client), when a db... key is set
#   sqlite3            (Debian package sqlite3), when none is
#
# Run it as root, or as a user who may read the settings file and the store.

set -eu
# Bytes are bytes, whatever the terminal speaks.
LC_ALL=C
export LC_ALL
# What holds the password must not be exported, and a variable that comes from
# the environment stays exported when it is assigned to.
unset dbpass line trimmed value
# The settings file says which server and which password; these would object.
unset MYSQL_PWD MYSQL_HOST MYSQL_TCP_PORT MYSQL_UNIX_PORT

settings=/etc/postfix/policyd.cfg
tab=$(printf '\t')

usage() {
    cat <<EOF
Usage: ${0##*/} [-w] [-c FILE]

Print the twenty logins with the most recipients of the last 24 hours.

  -w       of the last 7 days
  -c FILE  policyd's settings file (default: $settings)
  -h       print this help
EOF
}

die() { # MESSAGE
    # In one line and without control characters, whoever worded it.
    message=$(printf '%s' "$1" | tr '\n' ' ' | tr -c '[:print:]' '?')
    printf '%s: %s\n' "${0##*/}" "$message" >&2
    exit 1
}

# ---- the settings file: data, never sourced ---------------------------------

wrong() { # MESSAGE about line $number
    die "$settings:$number: $1"
}

trim() { # TEXT: leaves it in $trimmed, without the white space around it
    trimmed=${1#"${1%%[![:space:]]*}"}
    trimmed=${trimmed%"${trimmed##*[![:space:]]}"}
}

check_port() { # PORT SETTING
    case $1 in
    '' | *[!0-9]* | ??????*) ;;
    *) if [ "$1" -gt 0 ] && [ "$1" -lt 65536 ]; then return; fi ;;
    esac
    wrong "$2 has no port from 1 to 65535"
}

read_line() { # LINE
    trim "$1"
    case $trimmed in
    '' | '#'*) return ;;
    *=*) ;;
    # The line itself is not shown: it may hold the password.
    *) wrong "no '='; a line is key=value, a comment starts with '#'" ;;
    esac
    value=${trimmed#*=}
    trim "${trimmed%%=*}"
    key=$trimmed
    trim "$value"
    value=$trimmed
    case $key in
    db*) embedded=no ;;
    esac
    case $key in
    dbhost) dbhost=$value dbhost_line=$number ;;
    dbport) check_port "$value" "dbport=$value" && dbport=$value ;;
    dbname) dbname=$value ;;
    dbuser) dbuser=$value ;;
    dbpass) dbpass=$value ;;
    db*) wrong "unknown setting $key; known are dbhost, dbport, dbname, dbuser, dbpass" ;;
    policy_table)
        # It stands in the statement itself: only a plain name may.
        case $value in
        *[!A-Za-z0-9_\$]*) wrong "policy_table=$value is not a plain SQL name (letters, digits, _ and \$)" ;;
        esac
        policy_table=$value
        ;;
    statedir) statedir=$value ;;
    *) return ;; # not for us
    esac
    if [ -z "$value" ] && [ "$key" != dbpass ]; then
        wrong "$key= has no value; give one, or remove the line to use the default"
    fi
}

read_settings() {
    number=0
    # Without the second half a last line that lacks its newline would be lost.
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        if [ "$number" -eq 1 ]; then
            line=${line#"$(printf '\357\273\277')"} # the byte order mark of UTF-8
        fi
        read_line "$line"
    done <"$settings"
    if [ "$embedded" = no ]; then
        [ -n "$dbname" ] || die "$settings: dbname= is missing, or no db... key should be there"
        [ -n "$dbuser" ] || die "$settings: dbuser= is missing, or no db... key should be there"
    fi
}

# ---- the output -------------------------------------------------------------

show() { # ANSWER WHERE
    # ANSWER is lines of: row, login in hexadecimal, recipients, messages.  A
    # login is what a client sent: printable ASCII is shown as it is, any other
    # byte as \xHH, so that it cannot talk to the terminal.
    printf 'The twenty logins with the most recipients of the last %s\n(%s)\n\n' "$period" "$2" |
        tr -c '[:print:]\n' '?'
    awk -F "$tab" '
        BEGIN {
            for (code = 32; code < 127; code++)
                if (code != 92)  # the backslash itself
                    text[sprintf("%02X", code)] = sprintf("%c", code)
            format = "%4s %12s %12s  %s\n"
            printf format, "rank", "recipients", "messages", "login"
        }
        $1 == "row" {
            login = ""
            for (i = 1; i < length($2); i += 2) {
                byte = substr($2, i, 2)
                login = login (byte in text ? text[byte] : "\\x" tolower(byte))
            }
            printf format, ++rank, $3, $4, login
        }
        END {
            if (!rank)
                print "no message was counted in this time"
        }' <<EOF
$1
EOF
}

# ---- MariaDB ----------------------------------------------------------------

split_server() { # host, host:port, [v6]:port or a bare v6: sets $host and $port
    port=$dbport
    case $1 in
    \[*\]) host=${1#\[} host=${host%\]} ;;
    \[*\]:*) host=${1#\[} host=${host%\]:*} port=${1##*:} ;;
    *:*:*) host=$1 ;;
    *:*) host=${1%:*} port=${1##*:} ;;
    *) host=$1 ;;
    esac
    number=$dbhost_line
    check_port "$port" "dbhost=$dbhost"
}

option() { # NAME VALUE: prints one line of an option file
    # In quotes, where only the backslash and the quote itself are special.
    sed -e 's/[\\"]/\\&/g' -e 's/.*/"&"/' -e "s/^/$1=/" <<EOF
$2
EOF
}

options() { # SERVER: prints the client's whole option file
    echo '[mysql]'
    case $1 in
    /*)
        echo 'protocol=SOCKET'
        option socket "$1"
        ;;
    *)
        # Or the client would take "localhost" for its default socket.
        echo 'protocol=TCP'
        option host "$host"
        option port "$port"
        ;;
    esac
    option user "$dbuser"
    option password "$dbpass"
    option database "$dbname"
    echo 'connect-timeout=2'
    echo 'default-character-set=utf8mb4'
    # As policyd itself connects: since 11.4 the client would else refuse a
    # server that speaks no TLS.
    echo 'loose-ssl-verify-server-cert=0'
}

ask_mariadb() {
    if command -v mariadb >/dev/null; then
        client=mariadb
    elif command -v mysql >/dev/null; then
        client=mysql
    else
        die 'neither mariadb nor mysql is installed; the Debian package is mariadb-client'
    fi
    # The window is policyd's own.  Logins are told apart byte by byte, also in
    # an old table, whose collation takes some letters for the same.
    sql="SELECT 'row', HEX(CONVERT(sasl_username USING utf8mb4)) AS login,
            COALESCE(SUM(recipient_count), 0) AS recipients, COUNT(*) AS messages
        FROM \`$policy_table\`
        WHERE ts > CURRENT_TIMESTAMP(3) - INTERVAL $days DAY
        GROUP BY login
        ORDER BY recipients DESC, messages DESC, login
        LIMIT 20"
    failures=
    # dbhost is split at commas and spaces, and its stars are no file names.
    IFS=", $tab"
    set -f
    for server in $dbhost; do
        case $server in
        '') continue ;; # between two commas
        /*) ;;
        *) split_server "$server" ;;
        esac
        # The option file comes through a descriptor: everyone could read the
        # password among the arguments.  --defaults-file also keeps the user's
        # own ~/.my.cnf out.
        if answer=$(
            "$client" --defaults-file=/dev/fd/3 --batch --skip-column-names --execute="$sql" 2>&1 3<<EOF
$(options "$server")
EOF
        ); then
            show "$answer" "$dbname.$policy_table on $server"
            return
        fi
        # "ERROR 1045 (28000): Access denied ..."; warnings may stand before it.
        failures="$failures${failures:+; }$server: ${answer#*ERROR }"
    done
    die "cannot read $dbname.$policy_table: ${failures:-dbhost= names no server}"
}

# ---- the embedded store -----------------------------------------------------

find_store() { # sets $store
    if [ -n "$statedir" ]; then
        set -- "$statedir"
    else
        set -- /var/lib/policyd "$PWD"
    fi
    for directory; do
        store=$directory/events.sqlite3
        if [ -e "$store" ]; then
            return
        fi
        if [ -d "$directory" ] && [ ! -x "$directory" ]; then
            die "$directory: permission denied; run this as root"
        fi
    done
    die "no events.sqlite3 in $1${2:+ or $2}: policyd has counted nothing there${2:+; statedir= in $settings would say where}"
}

ask_store() {
    find_store
    if [ ! -r "$store" ]; then
        die "$store: permission denied; run this as root"
    fi
    if ! command -v sqlite3 >/dev/null; then
        die 'sqlite3 is not installed; the Debian package is sqlite3'
    fi
    case $store in
    /*) ;;
    *) store=./$store ;; # not an option, and not an URI
    esac
    # ts is in milliseconds.
    sql="SELECT 'row', hex(sasl_username) AS login,
            coalesce(sum(recipient_count), 0) AS recipients, count(*) AS messages
        FROM events
        WHERE ts > strftime('%s', 'now', '-$days days') * 1000
        GROUP BY sasl_username
        ORDER BY recipients DESC, messages DESC, login
        LIMIT 20"
    # -init keeps the user's own ~/.sqliterc out.
    if answer=$(sqlite3 -batch -readonly -init /dev/null -cmd '.timeout 3000' -list -separator "$tab" \
        "$store" "$sql" 2>&1); then
        show "$answer" "$store"
    else
        die "cannot read $store: $answer"
    fi
}

# ---- main -------------------------------------------------------------------

days=1
period='24 hours'
given=no
while getopts c:hw option; do
    case $option in
    c) settings=$OPTARG given=yes ;;
    h)
        usage
        exit 0
        ;;
    w) days=7 period='7 days' ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -gt 0 ]; then
    usage >&2
    exit 2
fi

embedded=yes
dbhost=127.0.0.1 dbhost_line=0 dbport=3306 dbname='' dbuser='' dbpass=''
policy_table=events statedir=''

if [ -d "$settings" ]; then
    die "$settings: is a directory"
elif [ -e "$settings" ]; then
    if [ ! -r "$settings" ]; then
        die "$settings: permission denied; run this as root"
    fi
    read_settings
elif [ "$given" = yes ]; then
    die "$settings: no such file"
fi

if [ "$embedded" = yes ]; then
    ask_store
else
    ask_mariadb
fi
