"""Who and where: a login, a sender, an address and a list entry mean the same in all their spellings."""

from __future__ import annotations

import ipaddress
import socket

import hypothesis.strategies as st
import pytest
from asking import Relay, Unrecorded, a_request
from hypothesis import assume, given
from servers import DUNNO, HOLD
from stores import KeptLog, Store, incident, on_each_table, read_settings

from policyd import Policy, Settings, SettingsError, UserList, address_of, clean, login_of, place_of, printable

BLACKLISTED = "HOLD blacklisted"

# ---- a login ----------------------------------------------------------------------------------------

SHY, ZERO_WIDTH = "\u00ad", "\u200b"
ONE_ANNA = [
    "anna", "Anna", "ANNA", " anna", "anna ", "  anna  ", "anna@example.org", "Anna@Example.ORG", "anna@a@b",
    "anna @example.org", "anna@ example.org", "anna @ example.org", "EXAMPLE\\anna", "example\\ Anna ", "A\\B\\anna",
    "EXAMPLE\\anna@example.org", f"an{SHY}na", f"{ZERO_WIDTH}an\u2060n\ufe0fa", "\uff41nna", "anna\uff20example.org",
    "\u00a0anna\u3000",
]  # fmt: skip


@pytest.mark.parametrize("sasl_username", ONE_ANNA, ids=ascii)
def test_all_spellings_of_a_login_are_one(sasl_username: str) -> None:
    """Directories take them for the same account: none of them may have a quota of its own."""
    assert login_of(sasl_username, strip_domain=True) == "anna"


@pytest.mark.parametrize(
    ("sasl_username", "strip_domain", "login"),
    [
        ("Anna @ Example.ORG", False, "anna@example.org"),
        ("EXAMPLE\\Anna ", False, "example\\anna"),
        ("\u00c9MILE@example.org", True, "\u00e9mile"),
        ("E\u0301mile", True, "\u00e9mile"),
        ("John   Doe", True, "john doe"),
        ("@example.org", True, "@example.org"),  # nothing would be left of it
        ("EXAMPLE\\", True, "example\\"),
        ("  ", True, "  "),
        (SHY, True, SHY),
        ("", True, ""),
        ("a\tb", True, "a\tb"),  # a blank is U+0020
    ],
)
def test_a_login_is_whole_or_without_its_domain_but_never_nothing(
    sasl_username: str, strip_domain: bool, login: str
) -> None:
    assert login_of(sasl_username, strip_domain) == login


ODD = " @\\aAs\u00ad\u200b\u0345\u0130\u03a3\u0307\uff20\u3000\u00a0\u1160\u0301\u0327\uff3c\ufb01\u1e9e\u2126\u0390"
TEXT = st.text() | st.text(st.sampled_from(ODD), max_size=8)


@given(TEXT, st.booleans())
def test_a_login_is_the_login_of_itself(text: str, strip_domain: bool) -> None:
    """So what the log shows can be given to the tools, and written into the settings."""
    login = login_of(text, strip_domain)
    assert login_of(login, strip_domain) == login
    assert clean(clean(text)) == clean(text)
    assert bool(login) == bool(text)


@on_each_table
def test_all_spellings_of_a_login_share_a_quota(store: Store, logged: KeptLog) -> None:
    relay = Relay(store, logged, f"defaultquota={len(ONE_ANNA)}")
    answers = [relay.ask(sasl_username).answer for sasl_username in ONE_ANNA]
    assert answers == [DUNNO] * (len(ONE_ANNA) - 1) + [HOLD]
    assert {row[0] for row in store.rows()} == {"anna"}


@on_each_table
def test_a_quota_a_list_and_a_block_mean_all_spellings_of_a_login(store: Store, logged: KeptLog) -> None:
    """In whichever of them they are written."""
    relay = Relay(
        store, logged, "blacklist=Bob", f"whitelist=n{SHY}ews", "whitelist_days=1-7", "whitelist_hours=0-24",
        "quota=ALICE :2", "quota= john  doe:50", "defaultquota=40",
    )  # fmt: skip
    for sasl_username in ("bob ", " bob", "BOB@example.org", "EXAMPLE\\bob", f"bo{SHY}b", "bob @example.org"):
        assert relay.ask(sasl_username).answer == BLACKLISTED
    assert relay.ask("News ", recipient_count=99) == (
        DUNNO, ["skipping whitelisted user: news/alice@example.org/192.0.2.1/99"]
    )
    assert [relay.ask(each).answer for each in ("alice ", "EXAMPLE\\Alice")] == [DUNNO, HOLD]
    assert [relay.ask(each, recipient_count=25).answer for each in ("John Doe", "john  doe ")] == [DUNNO, HOLD]
    store.add([incident("dora", "HOLD blocked")], age_s=60)
    assert relay.ask(" Dora@example.org").answer == "HOLD blocked"


@on_each_table
def test_with_whole_logins_each_domain_has_its_own_quota(store: Store, logged: KeptLog) -> None:
    """As far as the table tells them apart: go-policyd's cuts them to 8 characters."""
    relay = Relay(store, logged, "strip_domain=no", "defaultquota=3", "quota=A@y.example:4")
    for sasl_username, quota in [("a@x.example", 3), ("A @Y.example", 4), ("a", 3), ("X\\a", 3)]:
        assert relay.ask(sasl_username, recipient_count=quota - 1).answer == DUNNO
        assert relay.ask(sasl_username).answer == HOLD


# ---- an address -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client_address", "address", "place"),
    [
        ("198.18.9.7", "198.18.9.7", "198."),
        ("::ffff:198.18.9.7", "198.18.9.7", "198."),
        ("::FFFF:C612:907", "198.18.9.7", "198."),
        ("64:ff9b::c612:907", "198.18.9.7", "198."),
        ("64:ff9b::198.18.9.7", "198.18.9.7", "198."),
        ("2001:DB8:0:0::0001", "2001:db8::1", "2001:"),
        ("fd00::1", "fd00::1", "fd00:"),
        ("::1", "::1", "0:"),
        ("fe80::1%eth0", "fe80::1", "fe80:"),
        ("64:ff9b:1::1", "64:ff9b:1::1", "64:"),
        *((text, None, None) for text in ("unknown", "", "localhost", "192.0.2", "192.0.2.256", "1.2.3.4.5", "::1::")),
    ],
)
def test_an_address_is_one_however_it_is_written_and_its_place_the_first_number(
    client_address: str, address: str | None, place: str | None
) -> None:
    """IPv4 also where it comes inside IPv6: behind inet_protocols=ipv6, a proxy or NAT64."""
    found = address_of(client_address)
    assert (found and str(found)) == address
    assert place_of(client_address) == place


@given(st.ip_addresses(v=4))
def test_ipv4_inside_ipv6_is_that_ipv4(address: ipaddress.IPv4Address) -> None:
    for inside in (f"::ffff:{address}", f"64:ff9b::{int(address) >> 16:x}:{int(address) & 0xFFFF:x}"):
        assert address_of(inside) == address
        assert place_of(inside) == place_of(str(address)) == f"{address.packed[0]}."


@given(st.ip_addresses(), st.ip_addresses())
def test_places_are_the_same_if_their_bits_are(one: ipaddress.IPv4Address, other: ipaddress.IPv4Address) -> None:
    """A /8 of IPv4, a /16 of IPv6."""
    assume(not any(inside in socket_bits(each)[:12] for each in (one, other) for inside in INSIDE))
    bits = [socket_bits(each)[: 1 if len(socket_bits(each)) == 4 else 2] for each in (one, other)]
    assert (place_of(str(one)) == place_of(str(other))) == (bits[0] == bits[1])


INSIDE = (bytes(10) + b"\xff\xff", b"\x00\x64\xff\x9b" + bytes(8))


def socket_bits(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    """Return an address as the kernel has it."""
    return socket.inet_pton(socket.AF_INET if address.version == 4 else socket.AF_INET6, str(address))


@given(st.text())
def test_whatever_is_logged_is_one_line_of_printable_ascii(text: str) -> None:
    shown = printable(text)
    assert shown.isascii()
    assert shown.isprintable() or not shown
    assert shown == text or shown.encode().decode("unicode_escape") == text


# ---- a list -----------------------------------------------------------------------------------------


def is_listed(entry: str, sasl_username: str = "anna", sender: str = "x@y", client_address: str = "192.0.2.1") -> bool:
    """Tell whether an entry of a blacklist holds such a message."""
    settings = read_settings("blacklist=phished", f"blacklist={entry}")
    replies: list[str] = []
    message = a_request(sasl_username=sasl_username, sender=sender, client_address=client_address)
    Policy(settings, Unrecorded(), lambda _: None).answer(message, "127.0.0.1", replies.append)  # type: ignore[arg-type]
    return replies == [BLACKLISTED]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("news", {"sasl_username": "News@example.org"}),
        ("news@example.org", {"sasl_username": "news@example.org"}),
        ("Registrar@Example.ORG", {"sender": "registrar@example.org"}),
        ("registrar@example.org", {"sender": "Registrar @Example.org"}),
        ("EXAMPLE\\bob", {"sasl_username": "example\\Bob"}),
        ("boris*master", {"sasl_username": "boris*master"}),  # so a master of Dovecot's logs in
        ("192.0.2.77", {"client_address": "192.0.2.77"}),
        ("192.0.2.77", {"client_address": "::ffff:192.0.2.77"}),
        ("::ffff:192.0.2.77", {"client_address": "192.0.2.77"}),
        ("64:ff9b::c000:24d", {"client_address": "::ffff:192.0.2.77"}),
        ("198.51.100.0/24", {"client_address": "198.51.100.255"}),
        ("198.51.100.0/24", {"client_address": "64:ff9b::c633:6403"}),
        ("::ffff:198.51.100.0/120", {"client_address": "198.51.100.3"}),
        ("2001:0DB8:0:0::0001", {"client_address": "2001:db8::1"}),
        ("2001:DB8:1::/48", {"client_address": "2001:db8:1:ffff::1"}),
        ("0.0.0.0/0", {"client_address": "203.0.113.9"}),
        ("@spam.example", {"sender": "lena@Spam.Example"}),
        ("@Spam.Example", {"sasl_username": "lena@spam.example"}),
        ("@spam.example", {"sasl_username": "lena @ spam.example "}),
        ("@spam.example", {"sender": "\"a@b\"@spam.example"}),
    ],
    ids=str,
)
def test_a_list_means_logins_senders_addresses_networks_and_domains(entry: str, message: dict[str, str]) -> None:
    """The domain of the sender, or of the login as Postfix gave it: also with strip_domain=yes."""
    assert is_listed(entry, **message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("news", {"sasl_username": "newsletter", "sender": "news@example.org"}),
        ("registrar@example.org", {"sasl_username": "registrar"}),
        ("example.org", {"sender": "x@example.org"}),
        ("198.51.100.0/24", {"client_address": "198.51.101.0"}),
        ("198.51.100.0/24", {"client_address": "unknown"}),
        ("::/0", {"client_address": "::ffff:192.0.2.1"}),  # that is IPv4
        ("@spam.example", {"sender": "lena@mail.spam.example", "sasl_username": "lena@spam.example.org"}),
        ("@spam.example", {"sasl_username": "spam.example", "sender": ""}),
    ],
    ids=str,
)
def test_a_list_means_nobody_else(entry: str, message: dict[str, str]) -> None:
    """Not parts of a name, nor subdomains."""
    assert not is_listed(entry, **message)


def test_an_empty_list_means_nobody() -> None:
    assert not UserList().line_of(["", "anna"], "192.0.2.1")


def test_a_list_tells_the_line_of_its_entry() -> None:
    settings = read_settings("# who", "blacklist=anna", "blacklist=192.0.2.0/24", "whitelist=bert", "blacklist=@a.b")
    assert settings.blacklist.line_of(["anna"], "") == 2
    assert settings.blacklist.line_of(["x"], "192.0.2.9") == 3
    assert settings.blacklist.line_of(["x", "@a.b"], "unknown") == 5
    assert settings.blacklist.line_of(["bert"], "192.0.3.9") == 0


@given(st.ip_addresses(), st.integers(0, 128), st.ip_addresses())
def test_a_network_holds_its_addresses_and_no_others(
    base: ipaddress.IPv4Address | ipaddress.IPv6Address,
    prefix: int,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    network = ipaddress.ip_network(f"{base}/{min(prefix, base.max_prefixlen)}", strict=False)
    assume(not any(socket_bits(each).startswith(INSIDE) for each in (base, address)))
    users = read_settings(f"blacklist={network}").blacklist
    assert users.line_of([], str(base)) == 1
    assert bool(users.line_of([], str(address))) == (address in network)


PIECES = st.sampled_from([*" @\\aA.:/%*#,;<>\"'-_0129f\u00e9\u00ad\u200b\u3000\uff20", "192.0.2.", "2001:db8:", "/24"])


ENTRIES = st.lists(PIECES, min_size=1, max_size=8).map("".join) | st.text(st.characters(blacklist_characters="\n"))


@given(ENTRIES)
def test_a_list_entry_that_is_accepted_matches_what_it_names(text: str) -> None:
    """And what can never match is refused."""
    try:
        blacklist = read_settings(f"blacklist={text}").blacklist
    except (SettingsError, UnicodeEncodeError):
        return
    entry = clean(text)
    address, slash, _ = entry.partition("/")
    if address_of(address) and (slash or blacklist.line_of([], address)):
        assert blacklist.line_of([], address)
    elif entry.startswith("@"):
        assert is_listed(text, sender=f"x{text}")
        assert is_listed(text, sasl_username=f"x{text}")
    else:
        assert is_listed(text, sasl_username=text)
        assert is_listed(text, sender=text)


@pytest.mark.parametrize("entry", ["@spam.example", "@SPAM.example", "@ spam.example"])
@on_each_table
def test_mail_of_a_domain_is_held_and_let_through(store: Store, logged: KeptLog, entry: str) -> None:
    always = ("whitelist_days=1-7", "whitelist_hours=0-24")
    relay = Relay(store, logged, f"blacklist={entry}", "whitelist=@partner.example", *always, "defaultquota=1")
    assert relay.ask("lena@spam.example").answer == BLACKLISTED
    assert relay.ask("lena", sender="Lena@Spam.Example").answer == BLACKLISTED
    assert relay.ask("max@partner.example").answer == DUNNO
    assert relay.ask("max", sender="max@partner.example").answer == DUNNO
    assert relay.ask("max@mail.partner.example").answer == HOLD
    assert store.rows() == [("max", "alice@example.org", "192.0.2.1", 1), ("max", "", "HOLD overquota", None)]


# ---- quotas by domain -------------------------------------------------------------------------------

DOMAINS = ("strip_domain=no", "defaultquota=999", "quota=@S.example:3", "quota=max@s.example:5", "quota=@t.example:9:4")


@pytest.mark.parametrize(
    ("login", "day", "hour"),
    [
        ("anna@s.example", 3, 0), ("max@s.example", 5, 0), ("anna@t.example", 9, 4),
        ("anna@x.s.example", 999, 0), ("anna", 999, 0), ("s.example", 999, 0), ("@s.example", 3, 0),
    ],
)  # fmt: skip
def test_a_quota_of_a_domain_is_for_its_logins_without_one_of_their_own(login: str, day: int, hour: int) -> None:
    """The domain is exact; `anna` alone belongs to none."""
    limits = read_settings(*DOMAINS).limits_of(login)
    assert (limits.hold_at, limits.hour) == (day, hour or Settings().limits_of("x").hour)


@on_each_table
def test_each_login_of_a_domain_has_that_quota(store: Store, logged: KeptLog) -> None:
    relay = Relay(store, logged, *DOMAINS)
    for sasl_username, count in [("a@s.example", 3), ("b@S.example ", 3), ("max@s.example", 5), ("c@t.example", 4)]:
        assert relay.ask(sasl_username, recipient_count=count - 1).answer == DUNNO
        assert relay.ask(sasl_username).answer.startswith("HOLD")
    assert relay.ask("a", recipient_count=900).answer == DUNNO
    assert [each["login"] for each in relay.told] == ["a@s.example", "b@s.example", "max@s.example", "c@t.example"]
