#!/bin/sh
# policyd-whatif.sh: what would another quota have done?  Who would have been
# held or refused on which day, had defaultquota been another one; for the
# postmaster who is about to change it.
#
# Reads policyd's settings file, and from there MariaDB or the embedded store,
# all events that are kept (keep_days); writes to neither.
#
# Needs sort, and policyd-common.sh beside it, which says what that needs.  Run
# it as root, or as a user who may read the settings file and the store.

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
Usage: ${0##*/} [-c FILE] [-r REJECT] QUOTA

Print who would have been held or refused, had defaultquota been QUOTA, by day
and login; then the totals, beside those of the settings as they are.

  -r REJECT  and had rejectquota been REJECT (default: rejectquota of the
             settings; without one, twice QUOTA)
  -c FILE    policyd's settings file (default: $settings)
  -h         print this help

Each message counted is asked about again, in order, with its login's sum of
the 24 hours up to it, itself included.  Logins with a quota= of their own keep
it.  Hour quotas, networks and lists are left out; so are forgiven messages.

Example: ${0##*/} 500
EOF
}

new_reject=
while getopts c:hr: option; do
    case $option in
    c) settings=$OPTARG given=yes ;;
    h)
        usage
        exit 0
        ;;
    r) new_reject=$OPTARG ;;
    *) wrong_call ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -ne 1 ] || ! is_number "$1" 1 || ! is_number "${new_reject:-1}" 1; then
    wrong_call
fi
without_zeros "$1"
new_quota=$number_10

read_settings
if [ -n "$new_reject" ]; then
    without_zeros "$new_reject"
    new_reject=$number_10
    if [ "$new_reject" -lt "$new_quota" ]; then
        die "-r $new_reject is below $new_quota; mail is held first, then refused"
    fi
else
    new_reject=${rejectquota:-$((2 * new_quota))}
    if [ "$new_reject" -lt "$new_quota" ]; then
        die "$settings:$rejectquota_line: rejectquota=$rejectquota is below $new_quota; give -r REJECT too"
    fi
fi
connect

# ---- the replay: rows stream by, login by login, each in order of time ------

if [ "$embedded" = yes ]; then
    milliseconds=ts order=', rowid'
else
    milliseconds="TIMESTAMPDIFF(MICROSECOND, '2000-01-01', ts) DIV 1000" order=
fi
statement="SELECT 'row', $(in_hex sasl_username), $milliseconds, SUBSTR($(moment ts), 1, 10), recipient_count
    FROM $table WHERE recipient_count > 0 ORDER BY $login_column, ts$order"

# shellcheck disable=SC2016 # awk's own dollars
result=$({
    settings_rows
    # The last row tells a whole answer from one that broke off.
    query "$statement" && echo end
} | awk -v new_quota="$new_quota" -v new_reject="$new_reject" "$awk_common"'
    # What the two sets of limits, now and new, have done.
    function count(kind, quota, reject) {
        if (sum < quota) {
            passed[kind]++
            return 0
        }
        if (affected[kind, who]++ == 0)
            logins[kind]++
        stopped[kind] += $5
        if (sum >= reject)
            rejected[kind]++
        else
            held[kind]++
        return 1
    }
    function end_day() {
        if (day_held + day_rejected)
            printf "1\t%s\t%.0f\t%s\t%d\t%d\t%.0f\n", day, day_stopped, who, day_held, day_rejected, peak
        day_held = day_rejected = day_stopped = peak = 0
    }
    $1 == "row" {
        if ($2 != who || $4 != day) {
            end_day()
            day = $4
            if (first == "" || day < first)
                first = day
            if (day > last)
                last = day
        }
        if ($2 != who) {
            split("", affected)
            who = $2
            oldest = 1
            newest = sum = 0
            limits_of(who)
            own = quota_line > 0
            if (own)
                owners++
        }
        newest++
        at[newest] = $3 + 0
        recipients[newest] = $5 + 0
        sum += $5
        # Strictly newer than 24 hours.
        while (at[oldest] <= at[newest] - 86400000)
            sum -= recipients[oldest++]
        count("now", quota, reject)
        if (count("new", own ? quota : new_quota, own ? reject : new_reject)) {
            day_stopped += $5
            if (sum >= (own ? reject : new_reject))
                day_rejected++
            else
                day_held++
        }
        if (sum > peak)
            peak = sum
        next
    }
    $1 == "end" { whole = 1; next }
    { complaint = complaint $0 " " }
    function totals(kind) {
        printf "2\t%s\t%d\t%d\t%d\t%.0f\t%d\n", kind, logins[kind], held[kind], rejected[kind], stopped[kind], passed[kind]
    }
    END {
        if (!whole) {
            print "failed\t" complaint
            exit
        }
        end_day()
        totals("now")
        totals("new")
        printf "3\t%d\t%s\t%s\n", owners, first, last
    }' | sort -t "$tab" -k1,1 -k2,2 -k3,3nr -k4,4)
case $result in
*"failed$tab"*)
    result=${result##*failed"$tab"}
    die "cannot read $where: ${result#*ERROR }"
    ;;
esac

# ---- the report -------------------------------------------------------------

printf 'Had the quota been %s, and mail refused from %s on\n(%s)\n\n' "$new_quota" "$new_reject" "$where" |
    tr -c '[:print:]\n' '?'
# shellcheck disable=SC2016 # awk's own dollars
printf '%s\n' "$result" | awk -v new_quota="$new_quota" -v defaultquota="$defaultquota" "$awk_common"'
    BEGIN {
        columns = "%-10s %-28s %8s %8s %10s %10s\n"
        sums = "%-20s %8s %8s %8s %10s %10s\n"
    }
    $1 == 1 {
        if (!days++)
            printf columns, "day", "login", "held", "refused", "recipients", "peak sum"
        printf columns, $2, fit(shown($4), 28), $5, $6, $3, $7
    }
    $1 == 2 { line[$2] = $0 }
    $1 == 3 { owners = $2; first = $3; last = $4 }
    function totals(kind, name,    field) {
        split(line[kind], field, FS)
        printf sums, name, field[3], field[4], field[5], field[6], field[7]
    }
    END {
        if (first == "") {
            print "no message is kept"
            exit
        }
        print days ? "" : "no message would have been held or refused\n"
        printf sums, "in total", "logins", "held", "refused", "recipients", "went on"
        totals("new", "quota " new_quota)
        totals("now", "as it is, " defaultquota)
        print "\nEvents are kept from " first " to " last "; the sums of the first 24 hours"
        print "lack what was sent before them."
        if (owners)
            print "Logins with a quota= of their own keep it: " owners "."
    }'
