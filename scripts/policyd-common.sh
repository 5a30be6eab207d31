#!/bin/sh
# policyd-common.sh: what the policyd-*.sh scripts share.  This is no command:
# install it beside them, they read it with `.` (and find it through a symbolic
# link to themselves, too).
#
#   die MESSAGE               one line on stderr, status 1
#   wrong_call                the caller's usage on stderr, status 2
#   read_settings             reads $settings as data; never sourced
#   login_of SASL_USERNAME    sets $login as policyd counts it
#   to_hex TEXT               prints TEXT in hexadecimal
#   settings_rows             prints the limits for $awk_common
#   $awk_common               awk functions: what is shown, quotas and states
#   connect                   finds the store or a server; sets $where, $table,
#                             $login_column, its $width in characters, and
#                             $by_login (which index keeps logins together)
#   ago, moment, in_hex, ...  print SQL for the store that connect found
#   query MARIADB [SQLITE]    prints the rows of the statement for the store
#   ask MARIADB [SQLITE]      the same, into $answer; dies if it cannot
#   change MARIADB [SQLITE]   runs it once, for writing; $answer; dies
#   colours                   sets $red, $yellow, $plain; empty if not wanted
#
# A script sets $settings and $given (yes: -c named the file), and writes a
# function `usage`, before it calls any of these.
#
# Needs awk, od, sed, tr, and one of
#   mariadb or mysql   (Debian package mariadb-client), when a db... key is set
#   sqlite3            (Debian package sqlite3), when none is

# shellcheck disable=SC2034 # most variables here are for the scripts

# Bytes are bytes, whatever the terminal speaks.
LC_ALL=C
export LC_ALL
# What holds the password must not be exported, and a variable that comes from
# the environment stays exported when it is assigned to.
unset dbpass line trimmed value
# The settings file says which server and which password; these would object.
unset MYSQL_PWD MYSQL_HOST MYSQL_TCP_PORT MYSQL_UNIX_PORT

settings=/etc/postfix/policyd.cfg
given=no
tab=$(printf '\t')
newline='
'

die() { # MESSAGE
    # In one line and without control characters, whoever worded it.
    message=$(printf '%s' "$1" | tr '\n' ' ' | tr -c '[:print:]' '?')
    printf '%s: %s\n' "${0##*/}" "$message" >&2
    exit 1
}

wrong_call() {
    usage >&2
    exit 2
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

is_number() { # TEXT LOWEST: up to nine digits
    case $1 in
    '' | *[!0-9]* | ??????????*) return 1 ;;
    esac
    [ "$1" -ge "$2" ]
}

without_zeros() { # NUMBER: leaves it in $number_10; a shell takes 010 for 8
    number_10=${1#"${1%%[!0]*}"}
    number_10=${number_10:-0}
}

check_number() { # LOWEST: of $key=$value
    is_number "$value" "$1" || wrong "$key=$value is not a number from $1 to 999999999"
    without_zeros "$value"
    value=$number_10
}

is_quota() { # TEXT
    case $1 in
    [Uu][Nn][Ll][Ii][Mm][Ii][Tt][Ee][Dd]) ;;
    *) is_number "$1" 0 ;;
    esac
}

read_quota() { # LOGIN:QUOTA or LOGIN:QUOTA:HOUR: adds a row to $quotas
    # Split from the right: a login may hold colons.
    name=${1%:*} quota=${1##*:} hour=''
    last=${name##*:}
    if [ "$last" != "$name" ] && is_quota "$quota" && is_quota "$last"; then
        hour=$quota quota=$last name=${name%:*}
        case $hour in
        [0-9]*) ;;
        *) hour=0 ;; # unlimited
        esac
    fi
    case $1 in
    *[[:space:]]* | :*) quota=none ;;
    *:*) ;;
    *) quota=none ;;
    esac
    if ! is_quota "$quota"; then
        wrong "quota=$1 is not LOGIN:NUMBER, LOGIN:unlimited or LOGIN:NUMBER:HOUR"
    fi
    quotas="$quotas${quotas:+$newline}quota$tab$number$tab$quota$tab$hour$tab$name"
}

read_window() { # NUMBER and s, m, h or d: sets $networks_window and $networks_window_s
    case $1 in
    *s) unit=1 ;;
    *m) unit=60 ;;
    *h) unit=3600 ;;
    *d) unit=86400 ;;
    *) unit=0 ;;
    esac
    if [ "$unit" -eq 0 ] || ! is_number "${1%?}" 1; then
        wrong "networks_window=$1 is no time; give a number and s, m, h or d, for example 1h"
    fi
    without_zeros "${1%?}"
    networks_window=$1 networks_window_s=$((number_10 * unit))
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
    defaultquota) check_number 1 && defaultquota=$value defaultquota_line=$number ;;
    rejectquota) check_number 1 && rejectquota=$value rejectquota_line=$number ;;
    keep_days) check_number 2 && keep_days=$value ;;
    hourquota) check_number 0 && hourquota=$value ;;
    max_networks) check_number 0 && max_networks=$value ;;
    networks_window) read_window "$value" ;;
    trusted_network) trusted_networks="$trusted_networks$value$newline" ;;
    mode) mode=$(printf '%s' "$value" | tr '[:upper:]' '[:lower:]') ;;
    strip_domain)
        case $value in
        [Yy][Ee][Ss]) strip_domain=yes ;;
        [Nn][Oo]) strip_domain=no ;;
        *) wrong "strip_domain=$value is neither yes nor no" ;;
        esac
        ;;
    quota) if [ -n "$value" ]; then read_quota "$value"; fi ;;
    blacklist) blacklist="$blacklist$number$tab$value$newline" ;;
    *) return ;; # not for us
    esac
    if [ -z "$value" ] && [ "$key" != dbpass ]; then
        wrong "$key= has no value; give one, or remove the line to use the default"
    fi
}

read_settings() {
    embedded=yes
    dbhost=127.0.0.1 dbhost_line=0 dbport=3306 dbname='' dbuser='' dbpass=''
    policy_table=events statedir=''
    defaultquota=1500 defaultquota_line='' rejectquota='' rejectquota_line='' strip_domain=yes keep_days=7
    hourquota=0 max_networks=0 networks_window=1h networks_window_s=3600 trusted_networks='' mode=enforce
    quotas='' blacklist=''
    if [ -d "$settings" ]; then
        die "$settings: is a directory"
    elif [ ! -e "$settings" ]; then
        if [ "$given" = yes ]; then
            die "$settings: no such file"
        fi
        return
    elif [ ! -r "$settings" ]; then
        die "$settings: permission denied; run this as root"
    fi
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
    if [ "${rejectquota:-$defaultquota}" -lt "$defaultquota" ]; then
        die "$settings:$rejectquota_line: rejectquota=$rejectquota is below defaultquota=$defaultquota"
    fi
}

# ---- logins, and what is shown of them --------------------------------------

login_of() { # SASL_USERNAME: leaves the account it stands for in $login
    # As policyd does, but for capitals beyond ASCII: type those small.
    login=$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]')
    if [ "$strip_domain" = yes ] && [ -n "${login%%@*}" ]; then
        login=${login%%@*}
    fi
    login=${login%"${login##*[! ]}"} # as a column gives it back
}

to_hex() { # TEXT
    printf '%s' "$1" | od -An -v -tx1 | tr -d ' \n' | tr 'a-f' 'A-F'
}

settings_rows() { # for $awk_common, to be read before all other rows
    # A login with a quota of its own has it, in the old table cut as the login.
    printf 'limits\t%s\t%s\t%s\t%s\n' "$defaultquota" "${rejectquota:-$((2 * defaultquota))}" "$width" "$strip_domain"
    if [ -n "$quotas" ]; then
        printf '%s\n' "$quotas"
    fi
}

# Rows begin with their kind, fields are separated by tabs, and logins from a
# store are in hexadecimal.  What a client sent is shown as printable ASCII,
# any other byte (and the backslash) as \xHH: it cannot talk to the terminal.
#   shown(hex), printable(text)   the one and the other
#   fit(text, width)              cut for a column, with a ">" that says so
#   limits_of(hex)                sets quota, reject and quota_line (0: default)
#   state_of(sum)                 ok, HOLD or REJECT by these
# shellcheck disable=SC2016 # awk's own dollars
awk_common='
    BEGIN {
        FS = "\t"
        never = 1e18
        for (code = 0; code < 256; code++) {
            byte = sprintf("%c", code)
            hex_of_byte[byte] = sprintf("%02X", code)
            text_of_hex[sprintf("%02X", code)] = code < 32 || code > 126 || code == 92 ? sprintf("\\x%02x", code) : byte
        }
    }
    function to_hex(text,    i, hex) {
        for (i = 1; i <= length(text); i++)
            hex = hex hex_of_byte[substr(text, i, 1)]
        return hex
    }
    function shown(hex,    i, text) {
        for (i = 1; i < length(hex); i += 2)
            text = text text_of_hex[substr(hex, i, 2)]
        return text
    }
    function printable(text) {
        return text ~ /[^ -~]|\\/ ? shown(to_hex(text)) : text
    }
    function fit(text, width) {
        return length(text) > width ? substr(text, 1, width - 1) ">" : text
    }
    # The first characters of a login in hexadecimal, which is UTF-8.
    function cut(hex, characters,    i) {
        for (i = 1; i < length(hex); i += 2)
            if (substr(hex, i, 1) !~ /[89AB]/ && --characters < 0)
                return substr(hex, 1, i - 1)
        return hex
    }
    function limits_of(login) {
        if (!(login in own_quota) && login in uncut)
            login = uncut[login]
        quota_line = 0
        quota = defaultquota
        reject = rejectquota
        hour_quota = ""
        if (login in own_quota) {
            quota = own_quota[login]
            reject = quota > 0 && quota < never ? 2 * quota : never
            hour_quota = own_hour[login]
            quota_line = own_line[login]
        }
    }
    function number(limit) {
        return limit == never ? "unlimited" : limit
    }
    function state_of(sum) {
        return sum >= reject ? "REJECT" : sum >= quota ? "HOLD" : "ok"
    }
    $1 == "limits" {
        defaultquota = $2 + 0
        rejectquota = $3 + 0
        width = $4 + 0
        strip_domain = $5
        next
    }
    $1 == "quota" {
        login = tolower($5)
        if (strip_domain == "yes" && login ~ /^[^@]+@/)
            sub(/@.*/, "", login)
        login = to_hex(login)
        own_line[login] = $2
        own_quota[login] = $3 ~ /^[0-9]/ ? $3 + 0 : never
        own_hour[login] = $4
        if (!(cut(login, width) in uncut))
            uncut[cut(login, width)] = login
        next
    }
'

colours() {
    red='' yellow='' plain=''
    if [ -t 1 ] && [ -z "${NO_COLOR-}" ]; then
        red=$(printf '\033[31m') yellow=$(printf '\033[33m') plain=$(printf '\033[0m')
    fi
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

options() { # prints the client's whole option file, for $server
    echo '[mysql]'
    case $server in
    /*)
        echo 'protocol=SOCKET'
        option socket "$server"
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

run_mariadb() { # STATEMENT
    # The option file comes through a descriptor: everyone could read the
    # password among the arguments.  --defaults-file also keeps the user's
    # own ~/.my.cnf out.
    "$client" --defaults-file=/dev/fd/3 --batch --skip-column-names --quick --execute="$1" 3<<EOF
$(options)
EOF
}

connect_mariadb() { # to the first server of dbhost that can read the table
    if command -v mariadb >/dev/null; then
        client=mariadb
    elif command -v mysql >/dev/null; then
        client=mysql
    else
        die 'neither mariadb nor mysql is installed; the Debian package is mariadb-client'
    fi
    # dbhost is split at commas and spaces, and its stars are no file names.
    set -f
    # shellcheck disable=SC2046
    set -- $(printf '%s' "$dbhost" | tr ',\t' '  ')
    set +f
    failures=
    for server; do
        case $server in
        /*) ;;
        *) split_server "$server" ;;
        esac
        if answer=$(run_mariadb "SELECT 'none' FROM \`$policy_table\` LIMIT 0;
            SELECT 'index', index_name FROM information_schema.statistics
                WHERE table_schema = DATABASE() AND table_name = '$policy_table'
                AND (seq_in_index, column_name) IN ((1, 'sasl_username'), (2, 'ts'))
                GROUP BY index_name HAVING COUNT(*) = 2 LIMIT 1;
            SELECT 'login', character_maximum_length, collation_name FROM information_schema.columns
                WHERE table_schema = DATABASE() AND table_name = '$policy_table'
                AND column_name = 'sasl_username'" 2>&1); then
            where="$dbname.$policy_table on $server" table="\`$policy_table\`"
            case $answer in
            *"login$tab"[0-9]*) ;;
            *) die "cannot read $where: it has no column sasl_username" ;;
            esac
            width=${answer##*login"$tab"}
            # Logins are told apart byte by byte, also in an old table, whose
            # collation takes some letters for the same.  In a new one the
            # column itself does, and its index puts them in order.
            by_login=''
            case ${width#*"$tab"} in
            utf8mb4_bin)
                login_column=sasl_username
                case $answer in
                *"index$tab"*)
                    by_login=${answer##*index"$tab"}
                    by_login="FORCE INDEX (\`${by_login%%"$newline"*}\`)"
                    ;;
                esac
                ;;
            *) login_column='CONVERT(sasl_username USING utf8mb4) COLLATE utf8mb4_bin' ;;
            esac
            width=${width%%"$tab"*}
            return
        fi
        # "ERROR 1045 (28000): Access denied ..."; warnings may stand before it.
        failures="$failures${failures:+; }$server: ${answer#*ERROR }"
    done
    die "cannot read $dbname.$policy_table: ${failures:-dbhost= names no server}"
}

# ---- the embedded store -----------------------------------------------------

connect_store() { # sets $store
    if [ -n "$statedir" ]; then
        set -- "$statedir"
    else
        set -- /var/lib/policyd "$PWD"
    fi
    store=
    for directory; do
        if [ -e "$directory/events.sqlite3" ]; then
            store=$directory/events.sqlite3
            break
        fi
        if [ -d "$directory" ] && [ ! -x "$directory" ]; then
            die "$directory: permission denied; run this as root"
        fi
    done
    if [ -z "$store" ]; then
        die "no events.sqlite3 in $1${2:+ or $2}: policyd has counted nothing there${2:+; statedir= in $settings would say where}"
    elif [ ! -r "$store" ]; then
        die "$store: permission denied; run this as root"
    fi
    if ! command -v sqlite3 >/dev/null; then
        die 'sqlite3 is not installed; the Debian package is sqlite3'
    fi
    where=$store table=events width=255 login_column=sasl_username by_login=''
    case $store in
    /*) ;;
    *) store=./$store ;; # not an option, and not an URI
    esac
}

run_sqlite() { # [-readonly] STATEMENT
    # -init keeps the user's own ~/.sqliterc out.
    sqlite3 -batch -init /dev/null -cmd '.timeout 3000' -list -separator "$tab" ${2+"$1"} "$store" "${2-$1}"
}

# ---- one way to both --------------------------------------------------------

# SQL that both understand is written once; these print what they say
# differently.  ts is a DATETIME in MariaDB, and milliseconds in SQLite.

ago() { # SECONDS
    if [ "$embedded" = yes ]; then
        printf "(CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) - %s * 1000)" "$1"
    else
        printf '(CURRENT_TIMESTAMP(3) - INTERVAL %s SECOND)' "$1"
    fi
}

day_after() { # TS
    if [ "$embedded" = yes ]; then
        printf '(%s + 86400000)' "$1"
    else
        printf '(%s + INTERVAL 1 DAY)' "$1"
    fi
}

hours_since() { # TS: whole ones
    if [ "$embedded" = yes ]; then
        printf '((%s - %s) / 3600000)' "$(ago 0)" "$1"
    else
        printf '(TIMESTAMPDIFF(MICROSECOND, %s, %s) DIV 3600000000)' "$1" "$(ago 0)"
    fi
}

moment() { # TS: as YYYY-MM-DD HH:MM:SS, local time, empty for NULL
    if [ "$embedded" = yes ]; then
        printf "COALESCE(strftime('%%Y-%%m-%%d %%H:%%M:%%S', %s / 1000, 'unixepoch', 'localtime'), '')" "$1"
    else
        printf "COALESCE(DATE_FORMAT(%s, '%%Y-%%m-%%d %%H:%%i:%%s'), '')" "$1"
    fi
}

in_hex() { # TEXT-COLUMN
    if [ "$embedded" = yes ]; then
        printf 'HEX(%s)' "$1"
    else
        printf 'HEX(CONVERT(%s USING utf8mb4))' "$1"
    fi
}

stored_login() { # HEX: the login as it is kept, as long as the column
    if [ "$embedded" = yes ]; then
        printf "SUBSTR(CAST(X'%s' AS TEXT), 1, %s)" "$1" "$width"
    else
        printf "LEFT(CONVERT(X'%s' USING utf8mb4), %s) COLLATE utf8mb4_bin" "$1" "$width"
    fi
}

connect() { # before any of these
    if [ "$embedded" = yes ]; then
        connect_store
    else
        connect_mariadb
    fi
}

query() { # MARIADB [SQLITE]: prints the rows
    # Also what the client complains of, in the end: use it as `ask` does, or
    # print a last row of your own after it, to tell a whole answer.
    if [ "$embedded" = yes ]; then
        run_sqlite -readonly "${2-$1}" 2>&1
    else
        run_mariadb "$1" 2>&1
    fi
}

ask() { # MARIADB [SQLITE]: the rows into $answer
    answer=$(query "$@") || die "cannot read $where: ${answer#*ERROR }"
}

change() { # MARIADB [SQLITE]: once, on the server that connect has found
    if [ "$embedded" = no ]; then
        answer=$(run_mariadb "$1" 2>&1) || die "cannot change $where: ${answer#*ERROR }"
    elif [ ! -w "$store" ]; then
        die "$where: not yours to change; run this as root"
    else
        answer=$(run_sqlite "${2-$1}" 2>&1) || die "cannot change $where: ${answer#*Error: }"
    fi
}
