#!/bin/sh
# policyd-top20.sh: who sends the most?  For cron jobs and hands that know it; for the postmaster.
#
#   policyd-top20.sh [-w] [-n N] [--csv | --json] [-c FILE]
#
# It is `policyd-admin top`, beside this script or on the PATH: policyd-admin top --help.

set -eu

here=$(dirname -- "$(readlink -f -- "$0")")
if [ -x "$here/policyd-admin" ]; then
    exec "$here/policyd-admin" top "$@"
fi
exec policyd-admin top "$@"
