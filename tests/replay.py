#!/usr/bin/env python3
"""What max_networks and hourquota would do: a day of simulated honest mail with an attack in it, as a table.

usage: tests/replay.py [--seed N] [--days N] [--users N]

The rule is policyd's own, on its embedded store under a simulated clock.  The attack is built like one on record:
two phished logins, 80 client addresses all over the world, 9 or 10 recipients a message, 3 messages a second.
The honest traffic is made up, and hard on max_networks where people move; what is assumed of whom stands below in
PEOPLE and the tables beside it.  Nobody looks at what is held: who is held stays so until the rule lets him go.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from policyd import DAY_S, DUNNO, HOUR_S, NOBODY, Event, Settings, SQLiteRepository, judge, networks_of, scope_of

USERS = 2000
MAX_NETWORKS = (5, 8, 10, 15)
HOUR_QUOTA = 300
MINUTE_S = 60

RULES = [
    Settings(),
    Settings(hourquota=HOUR_QUOTA),
    *(Settings(max_networks=most, hourquota=hour) for most in MAX_NETWORKS for hour in (0, HOUR_QUOTA)),
]
FURTHEST = Settings(max_networks=min(MAX_NETWORKS), hourquota=HOUR_QUOTA)  # what all of these rules need to know


class Message(NamedTuple):
    """What policyd is asked about, and when."""

    at: float  # seconds since midnight
    event: Event


# ---- networks: an address is drawn for each message, from where its sender is then ------------------------------

IPV6 = 0.9  # share of the messages of who has both: IPv4 is taken when it is quicker (Happy Eyeballs, RFC 8305)
Link = Callable[[], str]  # the way a device is connected; returns its address for the next message


class World:
    """Where honest people send from.  Private and documentation addresses stand for all of them."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._homes = 0
        self.campus = [f"10.1.{n}" for n in range(60)]  # offices: one /24 a building
        self.wifi = [f"10.2.{n}" for n in range(8)]  # the campus' wireless network, beyond its NAT
        self.vpn = [f"10.3.{n}" for n in range(2)]  # the campus' VPN: everybody comes out of two /24
        self.exits = [f"10.4.{n}" for n in range(40)]  # of commercial VPNs
        self.spots = [f"10.5.{n}" for n in range(250)]  # cafés, hotels, trains: a NAT each
        # Mobile carriers: so many /24 of carrier NAT, and so many /48 out of which a phone gets its /64.
        self.carriers = [([f"10.{6 + c}.{n}" for n in range(size)], c, size) for c, size in enumerate((16, 32, 64))]

    def fixed(self, network: str) -> Link:
        """Return a link that keeps its address."""
        address = f"{network}.{self._dice.randrange(1, 255)}"
        return lambda: address

    def home(self) -> Link:
        """Return a home: an address of its own, or its IPv6 prefix, in which the address changes all the time."""
        self._homes += 1
        four = self.fixed(f"10.{100 + self._homes // 256}.{self._homes % 256}")
        prefix = f"2001:db8:{0x1000 + self._homes:x}:{self._dice.randrange(1, 256):x}"
        six = self._dice.random() < 0.5

        def address() -> str:
            return self._privacy(prefix) if six and self._dice.random() < IPV6 else four()

        return address

    def mobile(self, carrier: int) -> Link:
        """Return a phone's link to its carrier: each time it attaches, it comes out somewhere else."""
        networks, number, size = self.carriers[carrier]
        four = self.fixed(self._dice.choice(networks))
        prefix = f"2001:db8:{(number + 1) << 8 | self._dice.randrange(size):x}:{self._dice.randrange(1, 65536):x}"
        return lambda: self._privacy(prefix) if self._dice.random() < IPV6 else four()

    def spot(self) -> Link:
        """Return a wireless network somewhere."""
        return self.fixed(self._dice.choice(self.spots))

    def _privacy(self, prefix: str) -> str:
        """Return a temporary address (RFC 8981)."""
        return f"{prefix}:{':'.join(f'{self._dice.randrange(0x1000, 0x10000):x}' for _ in range(4))}"


class Way(NamedTuple):
    """How one device is connected over the day: since when, and how; the first from midnight on."""

    since: list[float]
    links: list[Link]

    def address(self, at: float) -> str:
        """Return the client address of a message."""
        return self.links[bisect.bisect_right(self.since, at) - 1]()


def staying(link: Link) -> Way:
    """Return the way of a device that does not move."""
    return Way([0.0], [link])


def moving(
    dice: random.Random, base: Link, attach: Callable[[], Link], hours: Sequence[tuple[float, float]], slowest: int = 25
) -> Way:
    """Return the way of a device that is at `base`, but changes networks up to 6 times an hour in these `hours`."""
    way = Way([0.0], [base])
    for begin, end in hours:
        at = begin * HOUR_S
        while at < end * HOUR_S:
            way.since.append(at)
            way.links.append(attach())
            at += dice.uniform(10, slowest) * MINUTE_S
        way.since.append(end * HOUR_S)
        way.links.append(base)
    return way


# ---- people -----------------------------------------------------------------------------------------------------


class Person(NamedTuple):
    """A user with two devices."""

    computer: Way
    phone: Way
    by_phone: float  # share of the messages
    usual: int = 8  # messages a day: half of the people like this one send fewer
    sitting: int = 4  # of them that are sent one after the other, a minute and a half apart
    writes: tuple[float, float] | None = None  # from when to when, in hours; None: in office hours, and in the evening


def phone_of(
    dice: random.Random, world: World, base: Link, hours: Sequence[tuple[float, float]], slowest: int = 25
) -> Way:
    """Return the way of a phone: carrier after carrier's network, and a wireless network every fourth time."""
    carrier = dice.randrange(len(world.carriers))
    return moving(dice, base, lambda: world.spot() if dice.random() < 0.25 else world.mobile(carrier), hours, slowest)


COMMUTE = ((7.5, 8.5), (17.25, 18.5))


def webmail(dice: random.Random, world: World) -> Person:
    """Sends from the webmail server, all of whose users have its address; a little from a phone."""
    return Person(staying(lambda: "10.1.0.25"), phone_of(dice, world, world.home(), COMMUTE), 0.15)


def office(dice: random.Random, world: World) -> Person:
    """Has a desktop computer in an office, and a phone."""
    return Person(
        staying(world.fixed(dice.choice(world.campus))), phone_of(dice, world, world.home(), COMMUTE), 0.2
    )


def laptop(dice: random.Random, world: World) -> Person:
    """Carries a laptop from home to the office, through lecture rooms, and home again."""
    home, rooms = world.home(), [world.fixed(network) for network in dice.sample(world.wifi, 3)]
    computer = Way(
        [0.0, *(hour * HOUR_S for hour in (8.5, 10, 12, 14, 17.5))],
        [home, world.fixed(dice.choice(world.campus)), *rooms, home],
    )
    return Person(computer, phone_of(dice, world, home, COMMUTE), 0.3)


def home_office(dice: random.Random, world: World) -> Person:
    """Works at home, with and without the campus' VPN, which is dropped now and then."""
    home = world.home()
    computer = moving(dice, home, lambda: dice.choice([home, world.fixed(dice.choice(world.vpn))]), [(9, 17)])
    return Person(computer, staying(home), 0.2)


def field(dice: random.Random, world: World) -> Person:
    """Is on the road all day and sends nearly all from a phone, now and then a message."""
    base = world.home()
    return Person(staying(base), phone_of(dice, world, base, [(8, 12), (13, 18)]), 0.85, usual=16, sitting=1)


def train(dice: random.Random, world: World) -> Person:
    """Works some hours in a train, over a phone that loses its network again and again."""
    begin = dice.uniform(6, 16)
    hours = begin, begin + dice.uniform(2, 6)
    ride = phone_of(dice, world, world.spot(), [hours], 12)
    return Person(ride, ride, 0.5, usual=16, sitting=1, writes=hours)


def roaming(dice: random.Random, world: World) -> Person:
    """Is abroad: hotel, cafés, wireless networks of a conference, a foreign carrier."""
    hotel = world.spot()
    computer = moving(dice, hotel, lambda: dice.choice([hotel, world.spot()]), [(8, 20)])
    return Person(computer, phone_of(dice, world, hotel, [(8, 20)]), 0.5)


def vpn(dice: random.Random, world: World) -> Person:
    """Has a commercial VPN that is set to change its exit often, on the computer and on the phone."""

    def changing() -> Way:
        return moving(dice, world.home(), lambda: world.fixed(dice.choice(world.exits)), [(0, 24)])

    return Person(changing(), changing(), 0.3)


# Who, and how many of 2000.
PEOPLE = {webmail: 500, office: 600, laptop: 500, home_office: 200, field: 80, train: 60, roaming: 40, vpn: 20}

# ---- what they send ---------------------------------------------------------------------------------------------

# Recipients of a message: the share of the messages, and from how many to how many.
RECIPIENTS = ((0.75, 1, 1), (0.18, 2, 5), (0.06, 6, 20), (0.01, 21, 60))
SPREAD, MOST_MESSAGES = 0.9, 150  # of messages a day, which are log-normal: some people send ten times the usual
EVENING = 0.15  # share of the sittings
QUEUED = 0.03  # share of the people whose mail program sends 5 to 20 messages at once when it is online again
CLASSES = 0.02  # share of the people who write to a class of 250 that day: once or, with a correction, twice
CLASS = 250
LIST = 800  # recipients of the owner of a mailing list: 8 messages within minutes, from one address


def recipients(dice: random.Random) -> int:
    """Return the number of recipients of a message."""
    [(_, lowest, highest)] = dice.choices(RECIPIENTS, [share for share, _, _ in RECIPIENTS])
    return dice.randint(lowest, highest)


def sitting(dice: random.Random, person: Person) -> float:
    """Return when somebody begins to write."""
    if person.writes:
        return dice.uniform(*person.writes) * HOUR_S
    if dice.random() < EVENING:
        return dice.uniform(18.5, 23.5) * HOUR_S
    return min(max(dice.gauss(12.75, 2.75), 6), 19) * HOUR_S


def day_of(dice: random.Random, person: Person, login: str) -> Iterator[Message]:
    """Yield what a person sends, not in order."""

    def message(at: float, number: int) -> Message:
        at = min(at, DAY_S - 1)
        way = person.phone if dice.random() < person.by_phone else person.computer
        return Message(at, Event(login, f"{login}@example.org", way.address(at), number))

    left = min(MOST_MESSAGES, int(dice.lognormvariate(math.log(person.usual), SPREAD)))
    while left > 0:
        at = sitting(dice, person)
        for _ in range(min(left, dice.randint(1, 2 * person.sitting - 1))):
            yield message(at, recipients(dice))
            at += dice.expovariate(1 / 90)
            left -= 1
    if dice.random() < QUEUED:
        at = sitting(dice, person)
        for n in range(dice.randint(5, 20)):
            yield message(at + n, recipients(dice))
    if dice.random() < CLASSES:
        at = sitting(dice, person)
        for n in range(dice.randint(1, 2)):
            yield message(at + n * dice.uniform(5, 90) * MINUTE_S, CLASS)


def honest_day(dice: random.Random, users: int) -> list[Message]:
    """Return what everybody sends in a day; the last of the users is the owner of a mailing list."""
    world = World(dice)
    kinds = [kind for kind, number in PEOPLE.items() for _ in range(max(1, number * users // USERS))][: users - 1]
    kinds += [office] * (users - 1 - len(kinds))
    messages = [
        message
        for n, kind in enumerate(kinds)
        for message in day_of(dice, kind(dice, world), f"{kind.__name__}{n}")
    ]
    owner, at, address = f"owner{users}", dice.uniform(8, 18) * HOUR_S, world.fixed(world.campus[0])()
    return messages + [Message(at + 20 * n, Event(owner, "list@example.org", address, LIST // 8)) for n in range(8)]


# ---- the attack -------------------------------------------------------------------------------------------------

PHISHED = ("phished1", "phished2")
ADDRESSES = 80
MESSAGES = 350  # of each login: more than it takes to be refused for the sum
SPAM_RECIPIENTS = (8, 9, 9, 9, 9, 9, 10, 10, 10, 10)
PAUSE_S = 0.35  # between two messages, on the average


def attack(dice: random.Random) -> list[Message]:
    """Return an attack that begins in a random minute of the day: any login, any address, any message."""
    at = float(dice.randrange(DAY_S // MINUTE_S) * MINUTE_S)
    addresses = [f"198.{dice.randrange(256)}.{n}.{dice.randrange(1, 255)}" for n in range(ADDRESSES)]
    messages = []
    for n in range(MESSAGES * len(PHISHED)):
        login, address = PHISHED[n % len(PHISHED)], dice.choice(addresses)
        messages.append(Message(at, Event(login, "win@example.com", address, dice.choice(SPAM_RECIPIENTS))))
        at += dice.expovariate(1 / PAUSE_S)
    return messages


# ---- what the rules make of it ----------------------------------------------------------------------------------


class Outcome:
    """What one rule did on that day."""

    def __init__(self, rule: Settings) -> None:
        self.rule = rule
        self.leaked = dict.fromkeys(PHISHED, 0)  # recipients reached before the first HOLD
        self.decisions: dict[str, str] = {}  # the first one of each login that was held
        self.users: set[str] = set()  # honest ones who were held
        self.messages = 0  # of theirs that were held

    def add(self, event: Event, decision: str) -> None:
        """Take note of what was decided."""
        login = event.sasl_username
        if decision != DUNNO:
            self.decisions.setdefault(login, decision)
        if login not in PHISHED:
            self.users.update([login] if decision != DUNNO else [])
            self.messages += decision != DUNNO
        elif login not in self.decisions:
            self.leaked[login] += event.recipient_count


class Day(NamedTuple):
    """A day that was replayed."""

    users: int
    messages: int  # honest ones
    recipients: int  # theirs
    networks: list[int]  # the most that each user sent from within an hour, in order
    outcomes: list[Outcome]


def replay(seed: int, users: int = USERS, rules: Sequence[Settings] = RULES) -> Day:
    """Put the messages of a day through policyd's store and rule, one by one; return what became of them."""
    dice = random.Random(seed)
    honest = honest_day(dice, users)
    outcomes = [Outcome(rule) for rule in rules]
    most: collections.Counter[str] = collections.Counter()
    now = 0.0
    store = SQLiteRepository(":memory:", lambda: now)
    scope = scope_of(FURTHEST)
    for message in sorted(honest + attack(dice)):
        now, event = message
        store.insert([event], 0)
        usage = store.sum_recipients([event], scope, 0)[0]
        networks = len(networks_of(usage.addresses, NOBODY))
        most[event.sasl_username] = max(most[event.sasl_username], networks)
        for outcome in outcomes:
            limits = outcome.rule.limits_of(event.sasl_username)
            outcome.add(event, judge(usage, limits, outcome.rule)[0])
    total = sum(message.event.recipient_count for message in honest)
    return Day(users, len(honest), total, sorted(most[login] for login in most.keys() - PHISHED), outcomes)


def table(days: Sequence[Day]) -> Iterator[str]:
    """Yield the lines of the table: the mean of several days, in Markdown."""
    yield "| max_networks | hourquota | leaked | of each login | honest users held | honest messages held |"
    yield "|---|---|---|---|---|---|"
    for same in zip(*(day.outcomes for day in days)):
        rule = same[0].rule
        each = [sum(outcome.leaked[login] for outcome in same) / len(days) for login in PHISHED]
        users = sum(len(outcome.users) for outcome in same) / len(days)
        messages = sum(outcome.messages for outcome in same) / len(days)
        first = rule.max_networks or ("off" if rule.hourquota else f"off: quota {rule.defaultquota} alone")
        yield (
            f"| {first} | {rule.hourquota or 'off'} | {sum(each):.0f} | {each[0]:.0f} + {each[1]:.0f}"
            f" | {users:g} | {messages:g} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="another day (default: 1)")
    parser.add_argument("--days", type=int, default=1, help="the mean of so many days (default: 1)")
    parser.add_argument("--users", type=int, default=USERS, help=f"default: {USERS}")
    options = parser.parse_args()
    days = [replay(seed, options.users) for seed in range(options.seed, options.seed + options.days)]
    print(f"Honest users: {options.users}, their messages: {sum(day.messages for day in days) / len(days):.0f}", end="")
    print(f" to {sum(day.recipients for day in days) / len(days):.0f} recipients, days: {len(days)}")
    most = [n for day in days for n in day.networks]
    more = [f"{sum(n > than for n in most) / len(days):g} from more than {than}" for than in (1, 2, 3, *MAX_NETWORKS)]
    print(f"Users who sent from several networks within an hour: {', '.join(more)}\n")
    print("\n".join(table(days)))


if __name__ == "__main__":
    main()
