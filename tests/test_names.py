"""Who and where: a login, a sender, an address and a list entry mean the same in all their spellings."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
from asking import Relay, Unrecorded, a_request
from hypothesis import example, given
from servers import DUNNO, HOLD
from stores import KeptLog, Store, on_each_table, read_settings

from policyd import Policy, Settings, SettingsError, as_network, clean, place_of, printable

BLACKLISTED = "HOLD blacklisted"

SHY, ZERO_WIDTH = "\u00ad", "\u200b"
ONE_ANNA = [
    "anna", "Anna", "ANNA", " anna", "anna ", "  anna  ", "anna@example.org", "Anna@Example.ORG", "anna@a@b",
    "anna @example.org", "anna@ example.org", "anna @ example.org", "EXAMPLE\\anna", "example\\ Anna ", "A\\B\\anna",
    "EXAMPLE\\anna@example.org", f"an{SHY}na", f"{ZERO_WIDTH}an\u2060n\ufe0fa", "\uff41nna", "anna\uff20example.org",
    "\u00a0anna\u3000",
]  # fmt: skip


@pytest.mark.parametrize(("sasl_username", "strip_domain", "login"), [
    *((sasl_username, True, "anna") for sasl_username in ONE_ANNA), ("Anna @ Example.ORG", False, "anna@example.org"),
    ("EXAMPLE\\Anna ", False, "example\\anna"), ("\u00c9MILE@example.org", True, "\u00e9mile"),
    ("E\u0301mile", True, "\u00e9mile"), ("John   Doe", True, "john doe"),
    ("@example.org", True, "@example.org"),  # nothing would be left of it
    ("EXAMPLE\\", True, "example\\"), ("  ", True, "  "), (SHY, True, SHY), ("", True, ""),
    ("a\tb", True, "a\tb"),  # a blank is U+0020
], ids=ascii)  # fmt: skip
def test_all_spellings_of_a_login_are_one(sasl_username: str, strip_domain: bool, login: str) -> None:
    """Directories take them for the same account: none of them may have a quota of its own."""
    assert Settings(strip_domain=strip_domain).login_of(sasl_username) == login


ODD = " @\\aAs\u00ad\u200b\u0345\u0130\u03a3\u0307\uff20\u3000\u00a0\u1160\u0301\u0327\uff3c\ufb01\u1e9e\u2126\u0390"
TEXT = st.text() | st.text(st.sampled_from(ODD), max_size=8)


@given(TEXT, st.booleans())
def test_a_login_is_the_login_of_itself(text: str, strip_domain: bool) -> None:
    """So what the log shows can be given to the tools, and written into the settings."""
    settings = Settings(strip_domain=strip_domain)
    login = settings.login_of(text)
    assert settings.login_of(login) == login
    assert clean(clean(text)) == clean(text)
    assert bool(login) == bool(text)


@on_each_table
def test_a_quota_a_list_and_a_block_mean_all_spellings_of_a_login(store: Store, logged: KeptLog) -> None:
    """In whichever of them they are written; and all of them share a quota."""
    relay = Relay(
        store, logged, "blacklist=Bob", f"whitelist=n{SHY}ews", "whitelist_days=1-7", "whitelist_hours=0-24",
        "quota=ALICE :2", "quota= john  doe:50", f"defaultquota={len(ONE_ANNA)}",
    )  # fmt: skip
    assert [relay.ask(each).answer for each in ONE_ANNA] == [DUNNO] * (len(ONE_ANNA) - 1) + [HOLD]
    for sasl_username in ("bob ", " bob", "BOB@example.org", "EXAMPLE\\bob", f"bo{SHY}b", "bob @example.org"):
        assert relay.ask(sasl_username).answer == BLACKLISTED
    skipped = "skipping whitelisted user: news/alice@example.org/192.0.2.1/99"
    assert relay.ask("News ", recipient_count=99) == (DUNNO, [skipped])
    assert [relay.ask(each).answer for each in ("alice ", "EXAMPLE\\Alice")] == [DUNNO, HOLD]
    assert [relay.ask(each, recipient_count=25).answer for each in ("John Doe", "john  doe ")] == [DUNNO, HOLD]
    store.add([("dora", "", "HOLD blocked", None)], age_s=60)
    assert relay.ask(" Dora@example.org").answer == "HOLD blocked"
    assert {row[0] for row in store.rows()} == {"anna", "alice", "john doe"[: store.width], "dora"}


@pytest.mark.parametrize(("client_address", "address", "place"), [
    *((each, "198.18.9.7", "198.") for each in ("198.18.9.7", "::ffff:198.18.9.7", "::FFFF:C612:907",
        "64:ff9b::c612:907", "64:ff9b::198.18.9.7")), ("2001:DB8:0:0::0001", "2001:db8::1", "2001:"),
    ("fd00::1", "fd00::1", "fd00:"), ("::1", "::1", "0:"), ("fe80::1%eth0", "fe80::1%eth0", "fe80:"),
    ("64:ff9b:1::1", "64:ff9b:1::1", "64:"),
    *((text, None, None) for text in ("unknown", "", "localhost", "192.0.2", "192.0.2.256", "1.2.3.4.5", "::1::")),
])  # fmt: skip
def test_an_address_is_one_in_all_spellings(client_address: str, address: str | None, place: str | None) -> None:
    """Its place is the first number.  IPv4 is inside IPv6 behind inet_protocols=ipv6, a proxy or NAT64."""
    found = as_network(client_address)
    assert (found and str(found.network_address)) == address
    assert place_of(client_address) == place


@given(st.text())
def test_whatever_is_logged_is_one_line_of_printable_ascii(text: str) -> None:
    shown = printable(text)
    assert shown.isascii()
    assert shown.isprintable() or not shown
    assert shown == text or shown.encode().decode("unicode_escape") == text


def is_listed(entry: str, sasl_username: str = "anna", sender: str = "x@y", client_address: str = "192.0.2.1") -> bool:
    """Tell whether an entry of a blacklist holds such a message."""
    settings = read_settings("blacklist=phished", f"blacklist={entry}")
    replies: list[str] = []
    message = a_request(sasl_username=sasl_username, sender=sender, client_address=client_address)
    Policy(settings, Unrecorded(), lambda _: None).answer(message, "127.0.0.1", replies.append)  # type: ignore[arg-type]
    if as_network(entry):  # what is trusted is written the same way
        trusted = read_settings(f"trusted_network={entry}").trusted_network
        assert bool(trusted.line_of([], client_address)) == (replies == [BLACKLISTED])
    return replies == [BLACKLISTED]


LISTED = [
    ("news", {"sasl_username": "News@example.org"}), ("news@example.org", {"sasl_username": "news@example.org"}),
    ("Registrar@Example.ORG", {"sender": "registrar@example.org"}),
    ("registrar@example.org", {"sender": "Registrar @Example.org"}),
    ("EXAMPLE\\bob", {"sasl_username": "example\\Bob"}),
    *((each, {"sasl_username": each}) for each in ("boris*master", "4711*master")),  # so a master of Dovecot's logs in
    *(("192.0.2.77", {"client_address": each}) for each in ("192.0.2.77", "::ffff:192.0.2.77")),
    ("::ffff:192.0.2.77", {"client_address": "192.0.2.77"}),
    ("64:ff9b::c000:24d", {"client_address": "::ffff:192.0.2.77"}),
    *(("198.51.100.0/24", {"client_address": each}) for each in ("198.51.100.255", "64:ff9b::c633:6403")),
    ("::ffff:198.51.100.0/120", {"client_address": "198.51.100.3"}),
    ("2001:0DB8:0:0::0001", {"client_address": "2001:db8::1"}),
    ("2001:DB8:1::/48", {"client_address": "2001:db8:1:ffff::1"}), ("0.0.0.0/0", {"client_address": "203.0.113.9"}),
    *(("@spam.example", {"sender": each}) for each in ("lena@Spam.Example", "\"a@b\"@spam.example")),
    *(("@Spam.Example", {"sasl_username": each}) for each in ("lena@spam.example", "lena @ spam.example ")),
]  # fmt: skip
NOT_LISTED = [
    ("news", {"sasl_username": "newsletter", "sender": "news@example.org"}),
    ("registrar@example.org", {"sasl_username": "registrar"}), ("example.org", {"sender": "x@example.org"}),
    *(("198.51.100.0/24", {"client_address": each}) for each in ("198.51.101.0", "198.51.99.255", "unknown")),
    ("2001:DB8:1::/48", {"client_address": "2001:db8:2::"}),
    ("::/0", {"client_address": "::ffff:192.0.2.1"}),  # that is IPv4
    ("@spam.example", {"sender": "lena@mail.spam.example", "sasl_username": "lena@spam.example.org"}),
    ("@spam.example", {"sasl_username": "spam.example", "sender": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), LISTED + NOT_LISTED, ids=str)
def test_a_list_means_logins_senders_addresses_networks_and_domains(entry: str, message: dict[str, str]) -> None:
    """The domain of the sender, or of the login as Postfix gave it: also with strip_domain=yes.

    Not parts of a name, nor subdomains.
    """
    assert is_listed(entry, **message) == ((entry, message) in LISTED)


PIECES = st.sampled_from([*" @\\aA.:/%*#,;<>\"'-_0129f\u00e9\u00ad\u200b\u3000\uff20", "192.0.2.", "2001:db8:", "/24"])
ENTRIES = st.lists(PIECES, min_size=1, max_size=8).map("".join) | st.text(st.characters(blacklist_characters="\n"))


@given(ENTRIES)
@example("::/24\\")  # a login
def test_a_list_entry_that_is_accepted_matches_what_it_names(text: str) -> None:
    """And what can never match is refused."""
    text = text.strip()  # as a line of the file loses them
    try:
        blacklist = read_settings(f"blacklist={text}").blacklist
    except (SettingsError, UnicodeEncodeError):
        return
    entry = clean(text)
    address, slash, prefix = entry.partition("/")
    if as_network(address) and re.fullmatch("[0-9.]*", prefix) and (slash or blacklist.line_of([], address)):
        assert blacklist.line_of([], address)
    elif entry.startswith("@"):
        assert is_listed(text, sender=f"x{text}")
        assert is_listed(text, sasl_username=f"x{text}")
    else:
        assert is_listed(text, sasl_username=text)
        assert is_listed(text, sender=text)


DOMAINS = ("strip_domain=no", "defaultquota=90", "quota=@S.example:3", "quota=max@s.example:5", "quota=@t.example:9:4")


@on_each_table
def test_each_login_without_a_quota_of_its_own_has_that_of_its_domain(store: Store, logged: KeptLog) -> None:
    """The domain is exact; `anna` alone belongs to none.  As far as a table tells them apart: some cut logins."""
    relay = Relay(store, logged, *DOMAINS)
    for sasl_username, quota in (
        ("a@s.example", 3), ("b@S.example ", 3), ("max@s.example", 5), ("c@t.example", 4), ("a@x.s.example", 90),
        ("a", 90), ("s.example", 90), ("@s.example", 3), ("X\\a", 90),
    ):  # fmt: skip
        assert relay.ask(sasl_username, recipient_count=quota - 1).answer == DUNNO
        assert relay.ask(sasl_username).answer.startswith("HOLD")
    assert {"a@s.example", "b@s.example", "a", "x\\a"} <= {each["login"] for each in relay.told}
