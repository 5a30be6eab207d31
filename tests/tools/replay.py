#!/usr/bin/env python3
"""What the quotas and the early signs do: weeks of made-up honest mail, thieves of several kinds, and who is held when.

Who is held is decided by policyd's own store, watch and rules.

On record: a fast botnet (a log of 2019: 80 addresses, 24 of which lie in 20 places; 8 to 10 recipients a message, three
messages a second), a slow one (2026: 132 addresses in a week, a message every 5 to 40 minutes), and, most often, one
address and volume.  A guess: how many recipients the last two write to at a time, and all about honest people.

Assumed of these: POPULATIONS, KINDS, and the numbers beside them.  They persist for weeks.  Each has a home with an
address of its provider (half of them IPv6, too), an office, and a phone, which is in the wireless network there or not,
and whose carrier has a few places.  They work in trains, go abroad (hotel, cafés, a foreign SIM), write to a class
from wherever they are, send a monthly letter, come back from three weeks' leave, or are new.

WARM_UP days fill the table before the days that are judged.  Who is held goes on writing, and is forgiven by a human:
by day after half an hour to three hours, else between eight and ten in the morning.  Thieves are never forgiven.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import ipaddress
import math
import multiprocessing
import os
import random
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from policyd import LASTING, Event, Limits, Settings, SQLiteRepository, Usage, UserList, Watch, decide, place_of

MINUTE_S, HALF_HOUR_S, HOUR_S, DAY_S = 60, 1800, 3600, 86_400
WARM_UP = 31  # days: one more than the longest keep_days


class Rule(NamedTuple):
    name: str
    keep_days: int  # 0: the past does not matter
    settings: Settings


EARLY = {
    "more than 5 new places in 30 min, or 15 in 24 h": {"new_place_quota": 0},
    "100 recipients in 5 messages within 1 h from new places": {"max_places": 0},
    "both: early_signs=yes": {},
}
RULES = [
    Rule("quota 1500 alone", 0, Settings()),
    Rule("hourquota 300", 0, Settings(hourquota=300)),
    *(Rule(name, days, Settings(early_signs="yes", keep_days=days, **given))
      for name, given in EARLY.items() for days in (7, 30)),
]

# ---- where people are -----------------------------------------------------------------------------------------------

Link = Sequence[str]  # the way a device is connected: an IPv4 address, and an IPv6 one if there is
IPV6 = 0.9  # share of the messages of who has both (Happy Eyeballs, RFC 8305)
SITE = "198.18"  # stands for all networks of the site: offices, wireless, VPN
FIRST4 = [str(n) for n in range(1, 224) if n not in (10, 127, 198)]
FIRST6 = [f"{first + n:x}" for first, number in ((0x2400, 16), (0x2600, 8), (0x2A00, 20)) for n in range(number)]


class Population(NamedTuple):
    """What is assumed of the people as a whole."""

    name: str
    busy: float = 1  # times as many messages as KINDS says
    movers: int = 1  # times as many people of the kinds that move
    abroad: float = 0.004  # trips of 3 to 7 days that begin, a person and day
    classes: float = 0.02  # letters to a class, a person and working day
    attach: int = 15  # minutes after which a device on the move has another address, and a commercial VPN another exit
    carrier: int = 4  # places of a carrier in IPv4, and a quarter of it in IPv6
    provider: int = 3  # of a provider of homes, and one in IPv6
    country: int = 40  # of a country, a quarter of them in IPv6, and of a VPN: each exit has another
    trusted: bool = True  # trusted_network has the networks of the site


POPULATIONS = (
    Population("usual"),
    Population("hard", 1.5, 3, 0.008, 0.03, 10),
    Population("hard, wide", 1.5, 3, 0.008, 0.03, 10, carrier=12, provider=8, country=80),
    Population("pessimistic", 2, 5, 0.016, 0.04, 8, carrier=12, provider=8, country=80, trusted=False),
)


def address(dice: random.Random, first: str) -> str:
    if len(first) == 4:
        return f"{first}:{dice.getrandbits(16):x}:{dice.getrandbits(16):x}:{dice.getrandbits(16):x}::1"
    return f"{first}.{dice.getrandbits(8)}.{dice.getrandbits(8)}.{dice.randrange(1, 255)}"


class Country:
    """Its carriers, its providers, and the wireless networks of cafés, hotels and trains."""

    def __init__(self, dice: random.Random, people: Population) -> None:
        first4 = dice.sample(FIRST4, people.country * 3 // 4)
        first6 = dice.sample(FIRST6, people.country // 4)

        def links(places4: int, places6: int) -> list[Link]:
            of4, of6 = dice.sample(first4, places4), dice.sample(first6, places6)
            return [(address(dice, dice.choice(of4)), address(dice, dice.choice(of6))) for _ in range(100)]

        self.carriers = [links(people.carrier, people.carrier // 4) for _ in range(3)]
        self.providers = [links(people.provider, 1) for _ in range(4)]
        self.spots = links(len(first4), len(first6))


class World:
    def __init__(self, seed: int, people: Population) -> None:
        dice = random.Random(f"{seed} {people.name}")
        self.people, self.seed = people, seed
        self.here, *self.abroad = (Country(dice, people) for _ in range(10))
        self.exits = [[address(dice, first)] for first in dice.sample(FIRST4, people.country)]
        self.trusted = UserList([(ipaddress.ip_network(f"{SITE}.0.0/16"), 1)] if people.trusted else [])
        self.place_of = functools.cache(lambda client: place_of(client, self.trusted))


# ---- people ---------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What is assumed of so many people of 2000."""

    share: int
    by_phone: float = 0.25  # share of the messages
    usual: int = 8  # messages a working day: half of the people like this one send fewer
    sitting: int = 4  # of them that are sent one after the other, a minute and a half apart
    train: float = 0.01  # share of the working days with 2 to 6 hours at work in a train
    at_home: float = 0.1  # and of those spent at home
    moves: bool = False


KINDS = {
    "office": Kind(1600),
    "home office": Kind(200, at_home=0.8),  # half of the time in the site's VPN
    "field": Kind(80, 0.85, 16, 1, moves=True),  # on the road all day
    "traveller": Kind(90, 0.5, 12, 2, train=0.4, moves=True),
    "vpn": Kind(20, moves=True),  # a commercial one, wherever they are but in the office
    "monthly letter": Kind(10, 0, 0, train=0, at_home=0.3),  # an account for that alone
}
HOME, OFFICE, MOVING, ABROAD = range(4)  # where somebody is
RECIPIENTS = [1] * 3000 + [2, 3, 4, 5] * 180 + [*range(6, 21)] * 16 + [*range(21, 61)]  # of a message, equally likely
SPREAD = 0.7, 0.55  # of people, and of the days of one, both log-normal
WEEKEND = 0.2  # of a working day's messages
CLASS, TEACHERS = 250, 0.2  # a fifth of the people write all letters to a class: one message or, with a correction, two
LETTER, MONTHLY = [100] * 8, 0.02  # of the people send one beside their usual mail; 20 s a message, every 28 to 33 days
LEAVE, LEAVES = 21, 1.2  # days, and how often a year; in the three days after it twice the usual mail
NEWCOMERS = 0.02  # of the people come among the days that are judged


class Sent(NamedTuple):
    at: float  # seconds since the midnight before the first day, a Monday
    recipients: int
    client_address: str


class Person:
    """A login: what it sends in all those days, and what is special about some of them."""

    def __init__(self, world: World, number: int, days: int) -> None:
        self._dice = dice = random.Random(f"{world.seed} {world.people.name} {number}")
        shares = [kind.share * (world.people.movers if kind.moves else 1) for kind in KINDS.values()]
        [self.kind] = dice.choices(list(KINDS), shares)
        self._is, self._world, self._country, self._six = KINDS[self.kind], world, world.here, dice.random() < 0.5
        self._provider, self._carrier = dice.choice(world.here.providers), dice.choice(world.here.carriers)
        self._home, self._office = self._link(self._provider), [f"{SITE}.{number % 60}.{number % 250 + 1}"]
        self._pace = math.log(max(1, self._is.usual) * world.people.busy) + dice.gauss(0, SPREAD[0])
        self._classes = world.people.classes / TEACHERS if self._is.usual and dice.random() < TEACHERS else 0
        self._begins = dice.randrange(WARM_UP, days) if dice.random() < NEWCOMERS else 0
        self._back = dice.uniform(0, 365 / LEAVES)  # the first day after the leave: for most not in these weeks
        self._letter = dice.randrange(30) if not self._is.usual or dice.random() < MONTHLY else days
        self._returns = 0  # from abroad
        self.what: dict[int, str] = {}
        self.sent = sorted(message for day in range(days) for message in self._day(day))

    def _link(self, links: Sequence[Link]) -> Link:
        """Return one of these, for half of the people without its IPv6 address."""
        link = self._dice.choice(links)
        return link if self._six else link[:1]

    def _day(self, day: int) -> Iterator[Sent]:
        """Yield the messages of a day, not in order."""
        dice, works = self._dice, day % 7 < 5
        busy = (1 if works else WEEKEND) if self._is.usual else 0
        if day < self._begins or self._back - LEAVE <= day < self._back:
            return
        if dice.random() < 0.04:  # the provider gives the home another address
            self._home = self._link(self._provider)
        self._attached: dict[tuple[int, bool, int], Link] = {}
        self._plan = self._plan_of(day, works)
        if 0 < self._begins > day - 7:
            self.what[day] = "new"
        if self._back <= day < self._back + 3:
            self.what[day], busy = "back from leave", 2 * busy
        if works and day >= self._letter:
            self.what[day], self._letter = "monthly letter", day + dice.randint(28, 33)
            yield from self._several(day, LETTER, 20)
        left = min(150, int(busy * math.exp(self._pace + dice.gauss(0, SPREAD[1]))))
        while left > 0:
            number = min(left, dice.randint(1, 2 * self._is.sitting - 1))
            yield from self._several(day, dice.choices(RECIPIENTS, k=number), 90)
            left -= number
        if works and dice.random() < self._classes:
            yield from self._several(day, [CLASS] * dice.randint(1, 2), dice.uniform(5, 90) * MINUTE_S)

    def _plan_of(self, day: int, works: bool) -> list[tuple[float, int]]:
        """Return from which hour on somebody is where; in a train he does all his writing there."""
        dice = self._dice
        self._ride: tuple[float, float] | None = None
        if day >= self._returns and self._is.usual and dice.random() < self._world.people.abroad:
            self._returns, self._country = day + dice.randint(3, 7), dice.choice(self._world.abroad)
            self._hotel, self._sim = self._link(self._country.spots), dice.choice(self._country.carriers)
        if day < self._returns:
            self.what[day] = "abroad"
            return [(0, ABROAD)]
        if works and dice.random() < self._is.train:
            begin, hours = dice.uniform(6, 16), dice.uniform(2, 6)
            self.what[day], self._ride = "train", (begin, begin + hours)
            return [(0, HOME), (begin, MOVING), (begin + hours, HOME)]
        if self.kind == "field" and works:
            return [(0, HOME), (8, MOVING), (12, HOME), (13, MOVING), (18, HOME)]
        if not works or dice.random() < self._is.at_home:
            return [(0, HOME), (14, HOME if works else MOVING), (17, HOME)]
        return [(0, HOME), (7.5, MOVING), (8.5, OFFICE), (17.25, MOVING), (18.5, HOME)]

    def _several(self, day: int, recipients: Iterable[int], pause: float) -> Iterator[Sent]:
        """Yield messages one after the other, a pause of seconds between them."""
        dice = self._dice
        hour = dice.uniform(*self._ride) if self._ride else min(max(dice.gauss(13.5, 3.5), 6), 23.5)
        at = hour * HOUR_S
        for number in recipients:
            link = self._where(at, dice.random() < self._is.by_phone)
            yield Sent(day * DAY_S + at, number, link[-1 if dice.random() < IPV6 else 0])
            at = min(at + dice.expovariate(1 / pause), DAY_S - 1)

    def _where(self, at: float, phone: bool) -> Link:
        """Return how a device is connected: in another way after some time; on the move all go through the phone."""
        place = next(place for begin, place in reversed(self._plan) if begin * HOUR_S <= at)
        minutes = self._world.people.attach if place == MOVING or self.kind == "vpn" else 45
        slot = place, phone or place == MOVING, int(at / MINUTE_S / minutes)
        if slot not in self._attached:
            self._attached[slot] = self._attach(*slot[:2])
        return self._attached[slot]

    def _attach(self, place: int, phone: bool) -> Link:
        """Return the way in which a device comes to be connected."""
        luck = self._dice.random()
        if self.kind == "vpn" and place != OFFICE:
            return self._dice.choice(self._world.exits)
        if place == ABROAD:
            links = self._sim if luck < (0.5 if phone else 0.1) else self._country.spots
            return self._hotel if 0.5 <= luck < 0.75 else self._link(links)
        if place == MOVING or (phone and luck < 0.3):
            return self._link(self._carrier if luck < 0.75 else self._world.here.spots)
        if place == OFFICE:
            return [f"{SITE}.100.{self._dice.randrange(1, 255)}"] if phone else self._office
        return [f"{SITE}.200.1"] if self.kind == "home office" and luck < 0.5 else self._home


# ---- thieves --------------------------------------------------------------------------------------------------------


def thieves(dice: random.Random, at: float) -> dict[str, list[Sent]]:
    """Return what each kind of thief sends from a stolen login; the last two know the rules."""

    def bots(number: int) -> list[str]:  # all over the world, six in ten of them in thirty places
        heavy = dice.sample(FIRST4, 30)
        return [address(dice, dice.choice(heavy if dice.random() < 0.6 else FIRST4)) for _ in range(number)]

    def spam(addresses: Sequence[str], sizes: Sequence[int], pause: tuple[float, float], most: int) -> list[Sent]:
        times = accumulate((dice.uniform(*pause) for _ in range(most - 1)), initial=at)
        return [Sent(when, dice.choice(sizes), dice.choice(addresses)) for when in times]

    one = bots(1)
    return {
        "fast botnet": spam(bots(80), (8, 9, 9, 9, 9, 9, 10, 10, 10, 10), (0, 2 / 3), 200),
        "slow botnet": spam(bots(132), (1, 2, 3, 4, 5), (5 * MINUTE_S, 40 * MINUTE_S), 448),  # a week
        **{f"one address, {size} at a time": spam(one, (size,), (1, 9), 1600 // size) for size in (1, 10, 50)},
        "one address, 370 at a time": spam(one, (370,), (1, 9), 5),
        "five places, 99 an hour": spam(bots(5), (11,), (400, 410), 150),
    }


# ---- what the rules make of it --------------------------------------------------------------------------------------


class Incident(NamedTuple):
    at: float
    rule: str
    forgiven: float  # when


def forgiven_by_a_human(at: float) -> float:
    """Return when an honest user is forgiven who was stopped at this time."""
    dice, hour = random.Random(at), at % DAY_S / HOUR_S
    return at + HOUR_S * (dice.uniform(0.5, 3) if 8 <= hour < 17 else dice.uniform(8, 10) + 24 * (hour >= 17) - hour)


FORGIVE = (
    "UPDATE {table} SET recipient_count = COALESCE(-recipient_count, 0)"
    " WHERE {of_login} AND {since day} AND (recipient_count > 0 OR recipient_count IS NULL)"
)


class Login:
    """What a login has sent, and what policyd does about it.

    Its store and its watch are asked about candidates only: messages with which figures that are certainly not too low
    hold somebody.  `decide` is never softer for higher figures, so it passes the others.  The sweep looks within a
    minute after a message; if no other has come between, it sees no more places than there were with that message, so
    it finds nobody but after a candidate.
    """

    def __init__(self, sent: Sequence[Sent], world: World, since: float, phase: float) -> None:
        self._sent, self._world, self._since, self._phase = sent, world, since, phase  # of the sweep within its minute
        self._times = [message.at for message in sent]
        self.candidates = list(self._find())

    def _find(self) -> Iterator[tuple[int, Usage]]:
        """Yield the candidates: which message, and the highest figures, as if every place was new."""
        strictest = Limits(*(min(limits) for limits in zip(*(rule.settings.limits_of("anna") for rule in RULES))))
        places = [self._world.place_of(message.client_address) for message in self._sent]
        sums = [0, *accumulate(message.recipients for message in self._sent)]
        for n in range(bisect_left(self._times, self._since), len(self._times)):
            ages = DAY_S, HOUR_S, HALF_HOUR_S
            day, hour, half = (bisect_right(self._times, self._times[n] - age, 0, n) for age in ages)
            of_hour = sums[n + 1] - sums[hour]
            new_places, new_places_24h = (len(set(places[begin : n + 1])) for begin in (half, day))
            most = Usage(sums[n + 1] - sums[day], of_hour, frozenset(), 0, new_places, new_places_24h, of_hour)
            if decide(most, strictest).action != "DUNNO":
                yield n, most

    def incidents(self, rule: Rule, forgiven: Callable[[float], float]) -> list[Incident]:
        """Return when the login is stopped, each time that it has no incident."""
        found: list[Incident] = []
        limits, now, stored = rule.settings.limits_of("anna"), self._since, 0
        candidates = [each for each in self.candidates if decide(each[1], limits).action != "DUNNO"]
        if not candidates:
            return found
        settings = dataclasses.replace(rule.settings, trusted_network=self._world.trusted)
        directory = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        store = SQLiteRepository(f"{directory.name}/store", lambda: now)
        watch = Watch(store, lambda: now)
        times = [int(at * 1000) for at in self._times]
        events = [Event("anna", "", message.client_address, message.recipients) for message in self._sent]
        bert = Event("bert", "", "192.0.2.1", 1)  # some days ago, whenever that is: the table remembers
        store.insert([bert], 0, [int(now - 4 * DAY_S) * 1000])
        list(watch.sweep(settings, 0))
        for n, most in candidates:
            at = self._times[n]
            if found and at - DAY_S < found[-1].at <= at < found[-1].forgiven:
                continue
            if found and now < found[-1].forgiven <= at:
                begin, now = stored, found[-1].forgiven
                stored = bisect_left(self._times, now)
                store.insert(events[begin:stored], 0, times[begin:stored])
                store.ask(FORGIVE, {"login": "anna", "day": DAY_S})
            begin, now, stored = stored, at, n + 1
            store.insert([bert, *events[begin:stored]], 0, [int(at - 4 * DAY_S) * 1000, *times[begin:stored]])
            (usage,) = watch.look([events[n]], store.usages([events[n]], settings, 0), settings, 0)
            verdicts = [decide(usage, limits)]
            if verdicts[0].action != "DUNNO":
                store.insert([Event("anna", "", verdicts[0].incident, None)], 0)
            elif decide(most._replace(recipients=0, of_hour=0, from_new_places=0), limits).action != "DUNNO":
                now = at + MINUTE_S - (at - self._phase) % MINUTE_S
                if all(later > now for later in self._times[n + 1 : n + 2]):
                    verdicts = [verdict for _, verdict, _ in watch.sweep(settings, MINUTE_S)]
            found += [Incident(now, each.rule, forgiven(now)) for each in verdicts if each.action != "DUNNO"]
        store.close()
        directory.cleanup()
        return found


# ---- the figures ----------------------------------------------------------------------------------------------------

Notes = defaultdict[tuple[Any, ...], list[Any]]  # what was seen: by what it is, population or thief, rule and keep_days


def replay(people: Population, seed: int, users: int, days: int, victims: int) -> Notes:
    """Put some weeks of one population under the rules, and the thieves that some of them fall victim to."""
    world, notes, since = World(seed, people), Notes(list), WARM_UP * DAY_S
    for number in range(users):
        person, dice = Person(world, number, WARM_UP + days), random.Random(f"{seed} {people.name} {number} thieves")
        login = Login(person.sent, world, since, dice.uniform(0, MINUTE_S))
        judged = {int(message.at // DAY_S) for message in person.sent if message.at >= since}
        notes["abroad", people.name] += [day for day in judged if person.what.get(day) == "abroad"]
        for rule in RULES:
            held = (int(incident.at // DAY_S) for incident in login.incidents(rule, forgiven_by_a_human))
            notes[("held", people.name, *rule[:2])] += [person.what.get(day, person.kind) for day in held]
        begin = since + dice.uniform(0, DAY_S)
        for kind, stolen in thieves(dice, begin).items() if number < victims else ():
            login = Login(sorted([*person.sent, *stolen]), world, begin, dice.uniform(0, MINUTE_S))
            for rule in RULES:
                [first, *_] = login.incidents(rule, lambda at: math.inf) or [Incident(math.inf, "", math.inf)]
                passed = [message.recipients for message in stolen if message.at < first.at]
                notes[("leaked", kind, *rule[:2])].append((sum(passed), len(passed), first.rule not in LASTING))
    return notes


def median(figures: Iterable[int]) -> str:
    """Return the figure in the middle, and between which two nine in ten are."""
    ordered = sorted(figures)
    return "{} ({}-{})".format(*(ordered[len(ordered) * n // 20] for n in (10, 1, 19)))


def report(notes: Notes, units: float) -> Iterator[str]:
    """Yield the table, in Markdown, and what the manual says of its last line; a unit is 2000 people and a day."""
    names, kinds = [people.name for people in POPULATIONS], list(thieves(random.Random(1), 0))
    yield f"| rule | keep_days | fast botnet | slow botnet, messages | one address | {' | '.join(names)} |"
    yield "|---|" + "--:|" * (4 + len(names))
    for name, days, *_ in RULES:
        fast, slow, *one = (notes["leaked", kind, name, days] for kind in kinds[:5])
        leaks = [leak[0] for leak in fast], [leak[1] for leak in slow], [leak[0] for leaks in one for leak in leaks]
        held = [f"{len(notes['held', people, name, days]) / units:.2f}" for people in names]
        yield f"| {name} | {days or '-'} | {' | '.join([*map(median, leaks), *held])} |"
    yield ""
    for people in names:
        who, abroad = notes["held", people, name, days], len(notes["abroad", people])
        share = f"{100 * who.count('abroad') / max(1, abroad):.2f} % of {abroad} days abroad"
        yield f"- {people}: held on {share}; who, or when: {dict(Counter(who).most_common()) or 'nobody'}"
    for kind in kinds:
        recipients, messages, unseen = zip(*notes["leaked", kind, name, days])
        share = f"the quota alone holds {100 * sum(unseen) / len(unseen):.0f} %"
        yield f"- {kind}: {median(recipients)} recipients, {median(messages)} messages ({share})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="other people and thieves (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="so many of them, from --seed on (default: 3)")
    parser.add_argument("--users", type=int, default=2000, help="of each population and seed (default: 2000)")
    parser.add_argument("--days", type=int, default=28, help=f"that are judged, after {WARM_UP} (default: 28)")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.seeds)
    tasks = [(people, seed, options.users, options.days, options.users // 100)  # one in a hundred falls victim
             for seed in seeds for people in POPULATIONS[::-1]]  # fmt: skip
    notes, units = Notes(list), options.users * options.days * options.seeds / 2000
    with multiprocessing.Pool() as pool:
        for more in pool.starmap(replay, tasks, chunksize=1):
            for key, seen in more.items():
                notes[key] += seen
    print(f"Seeds {seeds[0]} to {seeds[-1]}, {options.users} people of each population, {options.days} days.")
    print("Of thieves: recipients before the hold, the middle one and nine in ten.  Held: per 2000 people and day.\n")
    print("\n".join(report(notes, units)))


if __name__ == "__main__":
    main()
