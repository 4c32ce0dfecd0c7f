"""Which colour is live: numbered state directories and one link that nginx follows.

`states/<n>/` is complete and durable before `current` points to it, and `current` changes by one rename: at every
instant, and after a power cut at any instant, `current` leads to a complete state.

A share of traffic is a link in the state (`split`, `shadow`) to `shares/<percent>/`, which holds one empty file for
each bucket that belongs to it: nginx puts a request into one of 100 buckets and looks whether that file is there.

Each look costs nginx time. So a state without shadow and maintenance has links more: for the live colour
`<colour>-serves`, to `shares/rest-<percent>/`, and with a split the same for the idle colour, to `shares/<percent>/`. A
bucket's file below one of these says at one look which colour serves it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rollout import files
from rollout.errors import ApplianceError

KEEP_STATES = 50
_NUMBER = re.compile(r"[1-9][0-9]*")


class RoutingBroken(ApplianceError):
    """`current` leads to something that isn't a complete state; only a hand or a bad disk does that."""


class State(NamedTuple):
    """One routing state. `previous` is what a rollback returns to; `releases` holds each colour's release then.

    `split` is the percentage of users whom the idle colour serves, `shadow` that of requests which are copied to it.
    In `maintenance` nobody is served but under `/test/`.
    """

    live: str
    since: str
    who: str
    reason: str | None = None
    command: str = "swap"
    number: int = 0
    previous: str | None = None
    previous_release: int | None = None
    releases: dict[str, int | None] = {}
    split: int = 0
    shadow: int = 0
    maintenance: bool = False


class Routing:
    """The directory `routing`. Changing methods are for the holder of the lock."""

    def __init__(self, directory: Path, colours: tuple[str, ...]) -> None:
        self.directory = directory
        self.states = directory / "states"
        self.shares = directory / "shares"
        self.current = directory / "current"
        self._colours = colours

    def read(self) -> State | None:
        """The present state, or None where no colour has ever been live. Raises RoutingBroken."""
        try:
            target = os.readlink(self.current)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._broken(f"isn't a readable link: {error.strerror}") from None
        directory = self.directory / target
        name = os.path.basename(target)
        if os.path.dirname(target) != "states" or not _NUMBER.fullmatch(name):
            raise self._broken(f"points to {target}, not to states/<number>")
        # nginx never reads state.json, so it doesn't decide here either.
        flags = [colour for colour in self._colours if (directory / colour).is_file()]
        if len(flags) != 1:
            raise self._broken(f"leads to {len(flags)} flag files of {' and '.join(self._colours)} instead of one")
        try:
            raw = json.loads((directory / "state.json").read_bytes())
            state = State(**{key: raw[key] for key in State._fields if key in raw})
        except OSError as error:
            raise self._broken(f"leads to a state without a readable state.json: {error.strerror}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(f"leads to a state.json that can't be used: {error}") from None
        if state.live != flags[0] or state.number != int(name):
            raise self._broken(f"leads to flag file {flags[0]}, but state.json says {state.live} in {state.number}")
        shares = {"split": state.split, "shadow": state.shadow}
        for flag, said in shares.items():
            if self._share_of(directory / flag) != said:
                raise self._broken(f"leads to a link {flag} that isn't the {said} % of its state.json")
        for flag, said in self._shortcuts(state).items():
            # States of earlier versions have none.
            if os.path.lexists(directory / flag) and (
                said is None or not (directory / flag).is_dir() or self._target_of(directory / flag) != said
            ):
                raise self._broken(f"leads to a link {flag} that doesn't fit its state.json")
        if (directory / "maintenance").is_file() != state.maintenance:
            raise self._broken(
                f"leads to a state.json that says maintenance {state.maintenance}, against its flag file"
            )
        return state

    def known(self) -> State | None:
        """The present state; None also where it can't be read, for those who go on without one."""
        try:
            return self.read()
        except RoutingBroken:
            return None

    def _shortcuts(self, state: State) -> dict[str, str | None]:
        """What the links that spare nginx further looks must lead to; None for those that mustn't be there."""
        links: dict[str, str | None] = dict.fromkeys(map(self._shortcut, self._colours))
        if not (state.shadow or state.maintenance):
            for colour in self._colours:
                if colour == state.live:
                    links[self._shortcut(colour)] = f"../../shares/rest-{state.split}"
                elif state.split:
                    links[self._shortcut(colour)] = f"../../shares/{state.split}"
        return links

    @staticmethod
    def _shortcut(colour: str) -> str:
        return f"{colour}-serves"

    @staticmethod
    def _target_of(link: Path) -> str | None:
        """Where a link leads to; None where it can't be read, or is no link."""
        try:
            return os.readlink(link)
        except OSError:
            return None

    @staticmethod
    def _share_of(link: Path) -> int | None:
        """The percentage that a link in a state stands for; None where it can't be used."""
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            return 0
        except OSError:
            return None
        name = os.path.basename(target)
        return int(name) if target == f"../../shares/{name}" and _NUMBER.fullmatch(name) and link.is_dir() else None

    def _broken(self, what: str) -> RoutingBroken:
        return RoutingBroken(
            f"{self.current} {what}; look at it, then remove that link and run 'appliance init COLOUR' "
            f"for the colour that should be live"
        )

    def switch(self, state: State, way_back: State | None = None) -> tuple[State, float]:
        """Make `state` (its number is set here) the present one, with a `way_back` complete beside it.

        Returns the state as written and the monotonic time in seconds of the rename. Raises OSError; then the
        present state is the old one, except where only the last fsync failed.
        """
        files.ensure_directory(self.states)
        self.clean()
        if way_back is not None:
            self._write(way_back)
        state = self._write(state)
        return state, self.point_to(state.number)

    def switch_back(self, state: State) -> tuple[State, float]:
        """The same, where an older state that serves alike will do if a full disk takes no new one."""
        try:
            return self.switch(state)
        except OSError:
            number = self.way_back(state)
            if number is None:
                raise
            moment = self.point_to(number)
            return self.read() or state, moment

    def _write(self, state: State) -> State:
        """Make a state complete and durable; returns it with its number. Raises OSError."""
        for percent in {state.split, state.shadow} - {0}:
            self._ensure_share(str(percent), percent, range(percent))
        shortcuts = self._shortcuts(state)
        if shortcuts[self._shortcut(state.live)]:
            self._ensure_share(f"rest-{state.split}", state.split, range(state.split, 100))
        state = state._replace(number=self.next_number())
        temporary = self.states / f".new-{state.number}"
        try:
            files.make_directory(temporary)
            files.write_new(temporary / state.live, b"")
            for flag, percent in (("split", state.split), ("shadow", state.shadow)):
                if percent:
                    os.symlink(f"../../shares/{percent}", temporary / flag)
            for name, target in shortcuts.items():
                if target:
                    os.symlink(target, temporary / name)
            if state.maintenance:
                files.write_new(temporary / "maintenance", b"")
            files.write_new(temporary / "state.json", json.dumps(state._asdict(), indent=1).encode() + b"\n")
            files.fsync_directory(temporary)
            os.rename(temporary, self.states / str(state.number))
        except OSError:
            files.remove_tree(temporary)
            raise
        files.fsync_directory(self.states)
        return state

    def way_back(self, wanted: State) -> int | None:
        """The newest state that serves nobody but `wanted.live`, with its release and `wanted.maintenance`, or None."""
        mine = (wanted.live, wanted.releases.get(wanted.live), 0, wanted.maintenance)
        for state in self._until_now():
            if mine == (state.live, state.releases[state.live], state.split, state.maintenance):
                return state.number
        return None

    def became_live(self, colour: str) -> State | None:
        """The state in which a colour last became live with the release that it then had, or None.

        As far as the states that are kept tell, which for one that has been live for long is later than it was.
        """
        first = None
        for state in self._until_now():
            if state.live == colour and (first is None or first.releases[colour] == state.releases[colour]):
                first = state
            elif first is not None:
                break
        return first

    def _until_now(self) -> Iterator[State]:
        """The states until the present one that can be read, the newest first. Raises RoutingBroken."""
        present = self.read()
        # What comes after the present one was never pointed to: a crash left it, or it is a way back.
        numbers = [n for n in self._numbers() if n <= present.number] if present else []
        for number in sorted(numbers, reverse=True):
            try:
                raw = json.loads((self.states / str(number) / "state.json").read_bytes())
                state = State(**{key: raw[key] for key in State._fields if key in raw})
                state.releases[state.live]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            yield state

    def has_been_live(self, release: int) -> bool:
        """Whether a release has ever been live, as far as the states that are kept tell."""
        present = self.read()
        if present is None:
            return False
        return present.previous_release == release or any(
            state.releases[state.live] == release for state in self._until_now()
        )

    def next_number(self) -> int:
        """The number that the next state gets."""
        return max(self._numbers(), default=0) + 1

    def point_to(self, number: int) -> float:
        """Rename a link to `states/<number>` over `current`; returns the monotonic time in seconds of the rename."""
        temporary = self.directory / ".current.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.symlink(f"states/{number}", temporary)
        os.rename(temporary, self.current)
        moment = time.monotonic()
        files.fsync_directory(self.directory)
        return moment

    def _ensure_share(self, name: str, percent: int, buckets: range) -> None:
        """Make `shares/<name>/` with these buckets, durable before anything links to it."""
        if not 0 <= percent <= 100:
            raise ValueError(f"{percent} isn't a percentage from 0 to 100")
        directory = self.shares / name
        if directory.is_dir():
            return
        files.ensure_directory(self.shares)
        temporary = self.shares / f".new-{name}"
        files.remove_tree(temporary)
        try:
            files.make_directory(temporary)
            # One file under many names, so that there is but one to make durable.
            for bucket in buckets:
                if bucket == buckets.start:
                    files.write_new(temporary / str(bucket), b"")
                else:
                    os.link(temporary / str(buckets.start), temporary / str(bucket))
            files.fsync_directory(temporary)
            os.rename(temporary, directory)
        except OSError:
            files.remove_tree(temporary)
            raise
        files.fsync_directory(self.shares)

    def clear(self) -> None:
        """Go back to "no colour is live": only for an `init` that failed."""
        files.remove(self.current)

    def clean(self) -> None:
        """Remove what a crash left: temporary names, and states that `current` never pointed to."""
        for directory in (self.directory, self.states, self.shares):
            for path in directory.glob(".*"):
                files.remove_tree(path)
        present = self.read()
        if present is None:
            return
        # A killed predecessor may have renamed the link and not made it durable.
        files.fsync_directory(self.directory)
        for number in self._numbers():
            if number > present.number:
                self._remove_state(number)

    def prune(self, keep: int = KEEP_STATES) -> None:
        """Remove all but the last `keep` states."""
        present = self.read()
        for number in sorted(self._numbers(), reverse=True)[keep:]:
            if present is not None and number != present.number:
                self._remove_state(number)

    def _remove_state(self, number: int) -> None:
        # Renamed first, so that no half-removed directory ever bears the name of a state.
        rubbish = self.states / f".old-{number}"
        with contextlib.suppress(OSError):
            os.rename(self.states / str(number), rubbish)
        files.remove_tree(rubbish)

    def _numbers(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(self.states) if _NUMBER.fullmatch(name)]
        except FileNotFoundError:
            return []
