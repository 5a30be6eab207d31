#!/bin/sh
# build-deb.sh - make a Debian package of policyd: policyd_VERSION_all.deb
#
# For packagers, and for who installs policyd on many relays. Needs dpkg-deb, neither root nor network. What
# is in it is install.sh's list of files; what it does on its way in and out are install.sh's functions.

set -eu

usage() {
    cat <<TEXT
usage: build-deb.sh [DIRECTORY]

Makes policyd_VERSION_all.deb in the DIRECTORY, or in the one you are in. On the relays:

    apt-get install -y ./policyd_VERSION_all.deb    installs or upgrades; restarts policyd if it runs
    apt-get remove policyd                          leaves the settings and what is counted
    apt-get purge policyd                           leaves nothing but a table in MariaDB

DEBFULLNAME and DEBEMAIL name the maintainer, SOURCE_DATE_EPOCH the time of all files.
TEXT
}

die() {
    printf 'build-deb.sh: %s\n' "$*" >&2
    exit 1
}

of_setup_cfg() { # KEY DEFAULT
    sed -n "s/^$1 *= *//p" "$root/setup.cfg" | grep . || echo "$2"
}

# function_of_install_sh NAME...: print it, for a script of the package
function_of_install_sh() {
    for name; do
        sed -n "/^$name() {\$/,/^}/p" "$root/scripts/install.sh" | grep . || die "install.sh has no function $name"
    done
}

# Print what all scripts of the package begin with.
script_head() {
    cat <<'TEXT'
#!/bin/sh
set -e
export prefix=/usr settings=/etc/postfix/policyd.cfg home=/var/lib/policyd
export left=/etc/systemd/system/policyd.service # not ours: if it is there, systemd does not see the one in /usr
TEXT
    function_of_install_sh is_booted
}

# The settings are no conffile: a question about them would stop an installation.
postinst() {
    script_head
    function_of_install_sh make_user make_settings
    cat <<'TEXT'
[ "$1" = configure ] || exit 0
make_user
make_settings
if [ -e "$left" ] && grep -q '^Description=policyd, the Postfix policy daemon' "$left"; then
    echo "$left, which install.sh has left, hides the unit of this package; these lines remove it:"
    echo "    rm $left /usr/local/bin/policyd /usr/local/sbin/policyd-* /usr/local/share/man/man8/policyd.8"
    echo '    systemctl daemon-reload && systemctl try-restart policyd'
elif [ -e "$left" ]; then
    echo "$left is of another daemon and hides the unit of this package; to keep it as go-policyd:"
    echo "    systemctl disable --now policyd"
    echo "    mv $left ${left%/*}/go-policyd.service"
    if [ -e /usr/local/bin/policyd ]; then # a shell would find it first
        echo '    mv /usr/local/bin/policyd /usr/local/bin/go-policyd'
        echo "    sed -i 's|/usr/local/bin/policyd|/usr/local/bin/go-policyd|' ${left%/*}/go-policyd.service"
    fi
    echo '    systemctl daemon-reload && systemctl enable --now go-policyd'
fi
if is_booted; then
    systemctl --system daemon-reload
    if ! "$prefix/bin/policyd" --check-settings >/dev/null; then
        echo 'policyd was not restarted; mend this, then: systemctl restart policyd'
    elif [ -n "$2" ] && [ ! -e "$left" ]; then
        deb-systemd-invoke try-restart policyd.service ||
            echo 'policyd does not start; why: journalctl -t policyd -n 20'
    fi
fi
[ -L "${left%/*}/multi-user.target.wants/policyd.service" ] ||
    echo 'Next: policyd-admin doctor; systemctl enable --now policyd; let Postfix ask it (man policyd)'
TEXT
}

# The last moment at which there is a program to say where the counts are.
prerm() {
    script_head
    function_of_install_sh what_settings_say
    cat <<'TEXT'
[ "$1" = remove ] || exit 0
if [ ! -e "$left" ]; then
    ! is_booted || deb-systemd-invoke stop policyd.service
    rm -f "${left%/*}/multi-user.target.wants/policyd.service"
fi
said=$(what_settings_say "$prefix/bin/policyd" 2>/dev/null) || said=
[ ! -d "$home" ] || echo "${said#* * }" >"$home/statedir"
TEXT
}

postrm() {
    script_head
    function_of_install_sh purge_policyd
    cat <<'TEXT'
if is_booted; then
    systemctl --system daemon-reload
fi
[ "$1" = purge ] || exit 0
statedir=
[ ! -f "$home/statedir" ] || read -r statedir <"$home/statedir"
purge_policyd
TEXT
}

# Debian's form of the changelog, from CHANGELOG.md: "## VERSION (DATE)", below it paragraphs and lists.
changelog() {
    awk -v maintainer="$maintainer" -v now="$(date -u -d "@$SOURCE_DATE_EPOCH" +%F)" '
        function end_paragraph(cut) {
            while (length(text) > 79) {
                for (cut = 79; cut > 5 && substr(text, cut, 1) != " "; cut--);
                if (cut == 5) break
                print substr(text, 1, cut - 1)
                text = indent substr(text, cut + 1)
            }
            if (text != "") print text
            text = ""
        }
        function end_version(command) {
            end_paragraph()
            if (version == "") return
            command = "LC_ALL=C date -u -R -d " date
            command | getline date
            close(command)
            printf "\n -- %s  %s\n\n", maintainer, date
        }
        /^## / {
            end_version()
            version = $2
            date = match($0, /[0-9]+-[0-9]+-[0-9]+/) ? substr($0, RSTART, RLENGTH) : now
            printf "policyd (%s) unstable; urgency=medium\n\n", version
            next
        }
        version == "" { next }
        /^ *$/ { end_paragraph(); next }
        sub(/^- /, "  * ") { line = $0; end_paragraph(); text = line; indent = "    "; next }
        text == "" { text = "  " $0; indent = "  "; next }
        { sub(/^ */, " "); text = text $0 }
        END { end_version() }' "$root/CHANGELOG.md"
}

copyright() {
    cat <<TEXT
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: policyd

Files: *
$(sed -n 's/^Copyright (c) /Copyright: /p' "$root/LICENSE")
License: Expat
$(sed '1,/^Copyright/d; 1,/^$/{/^$/d}; s/^$/./; s/^/ /' "$root/LICENSE" | sed '1{/^ \.$/d}')
TEXT
}

case ${1-} in
-h | --help) usage && exit ;;
-*) die "unknown: $1; see build-deb.sh --help" ;;
esac
[ $# -le 1 ] || die 'one directory; see build-deb.sh --help'
directory=${1:-.}
[ -d "$directory" ] || die "$directory: no such directory"
command -v dpkg-deb >/dev/null || die 'dpkg-deb is missing: apt-get install -y dpkg'

umask 022
root=$(dirname "$(dirname "$(readlink -f "$0")")")
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date +%s)}
export SOURCE_DATE_EPOCH
maintainer="${DEBFULLNAME:-$(of_setup_cfg author 'The policyd authors')}"
maintainer="$maintainer <${DEBEMAIL:-$(of_setup_cfg author_email policyd@example.org)}>"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/policyd.py")
[ -n "$version" ] || die 'policyd.py does not say which version it is'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
tree=$work/tree
DESTDIR=$tree PREFIX=/usr "$root/scripts/install.sh"
sed -i '1s|^#!/usr/bin/env python3|#!/usr/bin/python3|' "$tree/usr/bin/policyd" "$tree/usr/sbin/policyd-admin"
gzip -9n "$tree/usr/share/man/man8/policyd.8"
for name in policyd-admin policyd-top20.sh; do
    ln -s policyd.8.gz "$tree/usr/share/man/man8/$name.8.gz"
done
doc=$tree/usr/share/doc/policyd
mkdir -p "$doc" "$tree/DEBIAN"
cp "$root/README.md" "$root/README.fr.md" "$doc"
sed -i 's|/usr/local/sbin/|/usr/sbin/|' "$doc"/README*
copyright >"$doc/copyright"
changelog | gzip -9n >"$doc/changelog.gz"

cat >"$tree/DEBIAN/control" <<TEXT
Package: policyd
Version: $version
Architecture: all
Maintainer: $maintainer
Section: mail
Priority: optional
Installed-Size: $(du -sk "$tree/usr" | cut -f 1)
Depends: python3 (>= 3.9), passwd
Recommends: python3-pymysql
Suggests: postfix, mariadb-server
Enhances: postfix
Description: Postfix policy daemon that limits recipients per login
 policyd stops a phished account from emptying a spammer's list through your
 relay: it counts the recipients of each SASL login over a sliding 24 hours, in
 MariaDB or in a file, and tells Postfix, message by message, to go on, to hold
 the mail for a human, or to refuse it. When it or its database is down, mail
 flows.
TEXT
for script in postinst prerm postrm; do
    "$script" >"$tree/DEBIAN/$script"
    chmod 0755 "$tree/DEBIAN/$script"
done
(cd "$tree" && find usr -type f -exec md5sum {} + >DEBIAN/md5sums)

package=$directory/policyd_${version}_all.deb
dpkg-deb --root-owner-group -Zxz --build "$tree" "$package" >/dev/null
echo "Made: $package"
