#!/bin/sh
# test.sh - run policyd's tests, on a fresh machine too
#
# For developers, on Debian or Ubuntu. Needs Python >= 3.9, and root to start a real Postfix and to
# install the packages that are missing; the servers that come with them are not started.
# Everything else goes to .venv in this repository.

set -eu

usage() {
    cat <<'TEXT'
usage: test.sh [PYTEST-ARGUMENT...]

Runs all tests, or what the arguments for pytest select:
    test.sh -m "not server"     needs neither MariaDB nor Postfix to be started
    test.sh -m "not postfix"    once the packages are there, without root only what mounts or has port 53 fails
    test.sh -k hold -x
PYTHON=... names another Python than python3 to make .venv with.
TEXT
}

die() {
    echo "test.sh: $*" >&2
    exit 1
}

# need PACKAGE COMMAND...: remember the package as missing if the command fails
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

# installed PACKAGE: for a package without a command to look for
installed() {
    dpkg-query -W -f '${Status}' "$1" | grep -q ' installed$'
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    # Debian asks this program before it starts a server that it installs; 101 means no.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    fi
    # Should this machine start its own Postfix one day, then not as a relay for the world.
    echo 'postfix postfix/main_mailer_type select Local only' | debconf-set-selections
    apt-get update -q
    # --no-remove: another mail server on this machine is not ours to replace.
    # shellcheck disable=SC2086 # a list of words
    apt-get install -q -y --no-install-recommends --no-remove $missing
    trap - EXIT
    rm -f /usr/sbin/policy-rc.d
}

case ${1-} in
-h | --help)
    usage
    exit 0
    ;;
esac

exec </dev/null
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # where an ordinary user does not look for servers

python=${PYTHON:-python3}
missing=
need python3 command -v "$python"
need python3-venv "$python" -c 'import ensurepip'
need mariadb-server command -v mariadbd
need mariadb-client command -v mariadb
need galera-4 installed galera-4
need rsync command -v rsync
need postfix command -v postfix
need sasl2-bin command -v saslpasswd2
need libsasl2-modules installed libsasl2-modules
need shellcheck command -v shellcheck
need sqlite3 command -v sqlite3
need systemd command -v systemd-analyze
need mandoc command -v mandoc
need openssl command -v openssl
need util-linux command -v unshare
need xz-utils command -v xzcat
if [ -n "$missing" ]; then
    [ "$(id -u)" -eq 0 ] || die "packages are missing; as root: apt-get install$missing"
    install_packages
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || die "$python is older than Python 3.9"
.venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
# Again only when what is to be installed has changed; policyd.py itself is used where it is.
if [ ! -e .venv/installed ] || [ -n "$(find setup.cfg pyproject.toml -newer .venv/installed)" ]; then
    .venv/bin/python -m pip install --quiet --editable '.[test]'
    touch .venv/installed
fi

exec .venv/bin/python -m pytest "$@"
