#!/bin/sh
# policyd-top20.sh: who sends the most?  The twenty logins with the most
# recipients of the last 24 hours, or of the last 7 days, and how near they are
# to their quotas; for the postmaster.
#
# Reads policyd's settings file, and from there MariaDB or the embedded store;
# writes to neither.  Held and refused messages count too, as they do in
# policyd.  A message is a row of the table: in MariaDB two from one login,
# sender and address in the same millisecond share a row, and show as one.
#
# Needs policyd-common.sh beside it, which says what that needs.  Run it as
# root, or as a user who may read the settings file and the store.

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
Usage: ${0##*/} [-w] [-n N] [--csv] [-c FILE]

Print the twenty logins with the most recipients of the last 24 hours: their
messages, client addresses, share of the quota, and state (ok, HOLD, REJECT).

  -w       of the last 7 days.  A quota is for 24 hours: here the bar compares
           with the first login of the list, and the state is still the one of
           the last 24 hours
  -n N     N logins (1 to 9999)
  --csv    comma-separated values for a spreadsheet: logins in full
  -c FILE  policyd's settings file (default: $settings)
  -h       print this help

Example: ${0##*/} -w -n 5
EOF
}

# ---- main -------------------------------------------------------------------

days=1
period='24 hours'
rows=20
form=table
while getopts c:hn:w-: option; do
    case $option in
    c) settings=$OPTARG given=yes ;;
    h)
        usage
        exit 0
        ;;
    n) rows=$OPTARG ;;
    w) days=7 period='7 days' ;;
    -)
        [ "$OPTARG" = csv ] || wrong_call
        form=csv
        ;;
    *) wrong_call ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -gt 0 ] || ! is_number "$rows" 1 || [ "$rows" -gt 9999 ]; then
    wrong_call
fi

read_settings
connect
# The window is policyd's own.
ask "SELECT 'row', $(in_hex 'MIN(sasl_username)') AS login,
        COALESCE(SUM(recipient_count), 0) AS recipients, COUNT(*) AS messages, COUNT(DISTINCT client_address),
        COALESCE(SUM(CASE WHEN ts > $(ago 86400) THEN recipient_count END), 0)
    FROM $table $by_login
    WHERE ts > $(ago $((days * 86400)))
    GROUP BY $login_column
    ORDER BY recipients DESC, messages DESC, login
    LIMIT $rows"

case $rows in
20) heading='The twenty logins' ;;
*) heading="The $rows logins" ;;
esac
if [ "$form" = table ]; then
    printf '%s with the most recipients of the last %s\n(%s; quota %s)\n' "$heading" "$period" "$where" "$defaultquota" |
        tr -c '[:print:]\n' '?'
    if [ "$mode" = audit ]; then
        echo 'mode=audit: nothing is held; the state is what it would be'
    fi
    echo
fi
colours
# shellcheck disable=SC2016 # awk's own dollars
{
    settings_rows
    printf '%s\n' "$answer"
} | awk -v form="$form" -v days="$days" -v red="$red" -v yellow="$yellow" -v plain="$plain" "$awk_common"'
    function bar(share) {  # ten signs and a percentage: 18 columns; 99.9% is not yet 100%
        full = share > 1 ? 10 : int(share * 10)
        return "[" substr("##########", 1, full) substr("..........", 1, 10 - full) "]" \
            (share < 10 ? sprintf(" %4d%%", share * 100) : " >999%")
    }
    function share_of_quota(sum) {
        if (quota == 0)
            return "quota 0: all held"
        if (quota == never)
            return "unlimited"
        return bar(sum / quota)
    }
    function in_quotes(text) {
        gsub(/"/, "\"\"", text)
        return text ~ /[",]/ ? "\"" text "\"" : text
    }
    BEGIN {
        columns = "%4s %-21s %10s %8s %7s %-18s %s\n"
        if (form == "csv")
            print "rank,login,recipients,messages,clients,recipients_24h,quota,reject,state"
        else
            printf columns, "rank", "login", "recipients", "messages", "clients", \
                days == 1 ? "share of its quota" : "beside the first", "state"
    }
    $1 == "row" {
        limits_of($2)
        state = state_of($6)
        if (!rank++)
            first = $3
        if (form == "csv") {
            print rank "," in_quotes(shown($2)) "," $3 "," $4 "," $5 "," $6 "," \
                number(quota) "," number(reject) "," state
            next
        }
        if (state != "ok")
            state = (state == "HOLD" ? yellow : red) state plain
        printf columns, rank, fit(shown($2), 21), $3, $4, $5, \
            days == 1 ? share_of_quota($3) : bar(first ? $3 / first : 0), state
    }
    END {
        if (!rank && form == "table")
            print "no message was counted in this time"
    }'
