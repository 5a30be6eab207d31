#!/bin/sh
# install.sh - install policyd from this directory, upgrade it, or remove it
#
# For the postmaster, as root; with DESTDIR= for packagers, as anybody. Needs Python >= 3.9, and PyMySQL where
# the settings name a MariaDB. Can be run again at any time. build-deb.sh takes some of its functions.

set -eu

settings=/etc/postfix/policyd.cfg
home=/var/lib/policyd

usage() {
    cat <<TEXT
usage: install.sh [--remove | --purge] [PREFIX=DIRECTORY] [DESTDIR=DIRECTORY]

Installs policyd: its user, its directory, the programs, the manual page, the unit for systemd, and
$settings if there is none. Where policyd is installed already it becomes this version: this
version tries the settings before anything is replaced, and is started anew if the old one runs.

    --remove   takes all of it away but the settings, what is counted, and the user they belong to
    --purge    takes these too; a table in MariaDB stays
    PREFIX=    where to, if not to /usr/local; the unit goes to /etc/systemd/system, or with /usr there
    DESTDIR=   for packagers: puts the files below this directory and does nothing else
TEXT
}

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

# Print MODE SOURCE TARGET, a line for each file.
files() {
    cat <<LIST
0755 policyd.py $program
0755 scripts/policyd-admin $prefix/sbin/policyd-admin
0755 scripts/policyd-top20.sh $prefix/sbin/policyd-top20.sh
0644 policyd.8 $prefix/share/man/man8/policyd.8
0644 policyd.cfg.example $prefix/share/policyd/policyd.cfg.example
0644 scripts/schema.sql $prefix/share/policyd/schema.sql
0644 scripts/grafana-dashboard.json $prefix/share/policyd/grafana-dashboard.json
0644 unit.service $unit
LIST
}

# Those of 0.1.0: policyd-admin does what they did.
remove_old_scripts() {
    for script in user held whatif common; do
        rm -fv "$DESTDIR$prefix/sbin/policyd-$script.sh"
    done
}

# put MODE SOURCE TARGET: nobody finds half a file there, and what is to be read names this PREFIX
put() {
    [ ! -d "$3" ] || die "$3 is a directory"
    mkdir -p "${3%/*}"
    rm -f "$3.new"
    install -m "$1" "$2" "$3.new"
    [ "$1" = 0755 ] || sed -i "s|/usr/local/\(s\{0,1\}bin/policyd\)|$prefix/\1|g" "$3.new"
    mv -f "$3.new" "$3"
}

is_booted() {
    [ -d /run/systemd/system ] && command -v systemctl >/dev/null
}

# keep_the_other WHAT UNIT PROGRAM: refuse, with the lines that keep another daemon and make room for ours
keep_the_other() {
    kept=/etc/systemd/system/go-policyd.service
    echo "install.sh: $1 is not ours, and nothing was changed; these lines keep that daemon as go-policyd:"
    echo "    systemctl disable --now ${2##*/}"
    [ "$2" = "$kept" ] || echo "    mv $2 $kept"
    [ ! -f "$3" ] || echo "    mv $3 ${3%/*}/go-policyd"
    [ ! -f "$3" ] || echo "    sed -i 's|$3|${3%/*}/go-policyd|' $kept"
    echo '    systemctl daemon-reload'
    echo '    systemctl enable --now go-policyd'
    exit 1
} >&2

# Nothing of another daemon or another installation is overwritten, hidden or removed.
refuse_what_is_not_ours() {
    for place in /etc /usr/local/lib /usr/lib /lib; do
        found=$place/systemd/system/policyd.service
        [ -e "$found" ] || continue
        [ "$task" != --remove ] || [ "$found" = "$unit" ] || continue
        real=$(readlink -f "$found")
        [ "$real" != /dev/null ] || die "$found is masked: systemctl unmask policyd"
        starts=$(sed -n 's/^ExecStart=[-@:+!]*\([^ ]*\).*/\1/p' "$real" | tail -n 1)
        grep -q '^Description=policyd, the Postfix policy daemon' "$real" || keep_the_other "$found" "$real" "$starts"
        ! dpkg -S "$real" >/dev/null 2>&1 || die "$found belongs to a package: upgrade that, or apt-get remove policyd"
        # A drop-in may start another program, say that of a virtual environment.
        starts=$(cat "$real" /etc/systemd/system/policyd.service.d/*.conf 2>/dev/null |
            sed -n 's/^ExecStart=[-@:+!]*\(.\)/\1/p' | tail -n 1)
        case " $starts " in *" $program "*) continue ;; esac
        starts=${starts%% *}
        die "$found starts $starts: remove that, or give PREFIX=${starts%/bin/*}"
    done
    # The program's own text, or what pip makes of it.
    if [ -e "$program" ] && ! grep -aq -e '^"""policyd: a Postfix poli' -e '^from policyd import main' "$program"; then
        real=$(grep -ls "^ExecStart=.*$program" /etc/systemd/system/*.service | head -n 1)
        [ -n "$real" ] || die "$program is not ours; to keep it: mv $program $prefix/bin/go-policyd"
        keep_the_other "$program" "$real" "$program"
    fi
}

# Print what the settings say to a PROGRAM: where to listen, as Postfix writes it; the store; the statedir.
what_settings_say() {
    python3 - "$1" "$settings" <<'PYTHON'
import os, runpy, sys
Settings = runpy.run_path(sys.argv[1], run_name="policyd")["Settings"]
settings = Settings.from_file(sys.argv[2]) if os.path.exists(sys.argv[2]) else Settings()
bind = f"[{settings.bind}]" if ":" in settings.bind else settings.bind
unix = "unix:" + bind.replace("/var/spool/postfix/", "")  # smtpd may see no more than that
where = unix if "/" in bind else f"inet:{bind}:{settings.port}"
print(where, "MariaDB" if settings.dbname else "embedded", settings.statedir)
PYTHON
}

read_settings() {
    python3 -c 'import sys, sqlite3, ssl; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
        die 'Python 3.9 or newer is needed: apt-get install -y python3'
    if [ -e "$settings" ] || [ -L "$settings" ]; then
        python3 "$root/policyd.py" --check-settings -c "$settings" ||
            { status=$? && echo 'install.sh: nothing was changed' >&2 && exit "$status"; }
    fi
    said=$(what_settings_say "$root/policyd.py")
    listens=${said%% *}
    statedir=${said#* * }
    driver=$(python3 -c 'import pymysql; print("is there")' 2>/dev/null) || :
    case $task$driver$said in install*' MariaDB '*)
        [ -n "$driver" ] || die "$settings names a MariaDB, which needs PyMySQL: apt-get install -y python3-pymysql" ;;
    esac
}

make_user() {
    getent group policyd >/dev/null || groupadd --system policyd
    getent passwd policyd >/dev/null ||
        useradd --system --gid policyd --home-dir "$home" --no-create-home --shell /usr/sbin/nologin policyd
    [ -d "$home" ] || install -d -o policyd -g policyd -m 0755 "$home"
}

make_settings() {
    if [ -e "$settings" ]; then
        echo "Kept: $settings; all settings of this version: $prefix/share/policyd/policyd.cfg.example"
        return
    fi
    install -D -o root -g policyd -m 0640 "$prefix/share/policyd/policyd.cfg.example" "$settings"
    echo "Made: $settings"
}

prepare() {
    case $prefix/ in /home/* | /root/* | /tmp/* | /var/tmp/*) die "its unit keeps policyd from seeing $prefix" ;; esac
    read_settings
    new=$(python3 "$root/policyd.py" --version)
    old=$([ ! -e "$program" ] || "$program" --version 2>/dev/null || echo 'an unknown version')
    make_user
}

finish() {
    echo "$new is installed${old:+; before, it was $old}"
    remove_old_scripts
    make_settings
    [ -n "$driver" ] || echo 'PyMySQL is missing; only a MariaDB needs it: apt-get install -y python3-pymysql'
    runs=
    if is_booted; then
        systemctl daemon-reload
        case $old/$(systemctl is-active policyd) in
        ?*/active | ?*/activating | ?*/reloading)
            systemctl restart policyd || die 'policyd does not start; why: journalctl -t policyd -n 20'
            echo 'Restarted: policyd'
            runs=yes
            ;;
        esac
    fi
    PATH=$prefix/sbin:$prefix/bin:$PATH policyd-admin doctor || : # it says itself what is wrong
    [ -z "$runs" ] || return 0
    start="runuser -u policyd -- $program    # systemd does not run here: let your init do this"
    ! command -v systemctl >/dev/null || start='systemctl enable policyd'
    ! is_booted || start='systemctl enable --now policyd'
    cat <<TEXT

Two steps are left. Start it, now and at each boot:
    $start
Let Postfix ask it: below submission and submissions (or smtps) in /etc/postfix/master.cf add this line, with
the blanks in front of it, then: postfix reload
    -o { smtpd_end_of_data_restrictions = check_policy_service { $listens, timeout=10s, default_action=DUNNO } }
TEXT
}

remove_policyd() {
    if [ -z "$DESTDIR" ] && [ -e "$unit" ]; then
        ! is_booted || systemctl stop policyd
        ! command -v systemctl >/dev/null || systemctl --quiet disable policyd
    fi
    files | while read -r _ _ target; do
        rm -f "$DESTDIR$target"
    done
    remove_old_scripts
    [ ! -d "$DESTDIR$prefix/share/policyd" ] || rmdir "$DESTDIR$prefix/share/policyd" || :
    [ -z "$DESTDIR" ] || return 0
    ! is_booted || systemctl daemon-reload
    ! grep -qs '^[^#]*check_policy_service' /etc/postfix/main.cf /etc/postfix/master.cf ||
        echo 'Postfix may still ask policyd: look for check_policy_service in its main.cf and master.cf'
}

# Take settings, counts and user, too; of a statedir that is not policyd's, only the files that are.
purge_policyd() {
    for state in "$home" "$statedir"; do
        [ -d "$state" ] || continue
        state=$(readlink -f "$state")
        if [ "$state" = "$home" ] || [ "$(stat -c %U "$state")" = policyd ]; then
            find "$state" -xdev -mindepth 1 -delete
            rmdir "$state" 2>/dev/null || echo "Left: $state, empty"
        elif getent passwd policyd >/dev/null; then
            find "$state" -xdev -maxdepth 1 -type f -user policyd -delete
            echo "Left: $state, without policyd's files in it"
        fi
    done
    [ ! -L "$home" ] || rm "$home"
    rm -rf "$settings" /etc/systemd/system/policyd.service.d
    ! getent passwd policyd >/dev/null || userdel policyd
    ! getent group policyd >/dev/null || groupdel policyd
    echo 'policyd is purged'
}

task=install
for argument; do
    case $argument in
    -h | --help) usage && exit ;;
    --remove | --purge) task=$argument ;;
    PREFIX=*) PREFIX=${argument#*=} ;;
    DESTDIR=*) DESTDIR=${argument#*=} ;;
    *) die "unknown: $argument; see install.sh --help" ;;
    esac
done

umask 022
export PYTHONDONTWRITEBYTECODE=1
PATH=$PATH:/usr/sbin:/sbin # `su` without a dash lacks them
root=$(dirname "$(dirname "$(readlink -f "$0")")")
DESTDIR=${DESTDIR-}
prefix=${PREFIX:-/usr/local}
prefix=${prefix%/}
program=$prefix/bin/policyd
case $prefix in
*[!A-Za-z0-9/._+-]*) die "PREFIX=$prefix: letters, digits and / . _ + - only" ;;
/usr) unit=/usr/lib/systemd/system/policyd.service ;;
/*) unit=/etc/systemd/system/policyd.service ;;
*) die "PREFIX=$prefix: not an absolute path" ;;
esac
if [ -z "$DESTDIR" ]; then
    [ "$(id -u)" -eq 0 ] || die 'only root can do that: sudo ./scripts/install.sh'
    refuse_what_is_not_ours
fi

case $task in
install)
    files | while read -r mode source target; do
        [ -f "$root/$source" ] || die "$source is missing: run it in policyd's directory"
    done
    [ -n "$DESTDIR" ] || prepare
    files | while read -r mode source target; do
        put "$mode" "$root/$source" "$DESTDIR$target"
    done
    [ -n "$DESTDIR" ] || finish
    ;;
--remove)
    remove_policyd
    [ -n "$DESTDIR" ] || echo "policyd is removed; $settings and $home are left, until --purge"
    ;;
--purge)
    [ -z "$DESTDIR" ] || die '--purge is for this machine: DESTDIR holds no more than --remove takes'
    read_settings
    remove_policyd
    purge_policyd
    ;;
esac
