"""The transfer protocol: who may do what when, and when each side's blocks are free again. The machines are in
source_transfer.py and destination_transfer.py, pure: values in, values out, the time handed in.

    offer -> accept | refuse, then (chunk -> ready -> bytes on the link)*, commit -> ack; abort by either side, any time

Messages may be lost, repeated, late or reordered. Each side has exactly one end, and reports it once.

Source                 | OFFERED            | SENDING                            | CLOSING
-----------------------+--------------------+------------------------------------+------------------------------
blocks computed        | keep for later     | gather, by chunks                  | ignore
chunk sent             | -                  | migration: report how many blocks  | ignore
commit asked           | keep for later     | send commit                        | ignore
accept                 | -> SENDING, report | ignore (repeated)                  | ignore
refuse                 | refused            | ignore                             | ignore
chunk gathered         | -                  | send chunk                         | closed, when it was the last
ready                  | send filler        | send the chunk; filler if unknown  | send filler
  for another length   | send filler        | send filler                        | send filler
ack                    | ignore             | closed; too early: abort, CLOSING  | ignore
abort asked            | send abort, closed | send abort, CLOSING                | ignore
abort from the peer    | refused            | CLOSING                            | ignore
link lost              | refused            | CLOSING                            | ignore
deadline               | send abort, refused| send abort, CLOSING                | -

The source's blocks are read in SENDING and CLOSING only, and only by gathers: `closed` waits for those that have begun.
`refused` says that the destination took nothing, so the request may be handed elsewhere. Bytes that were gathered
before an abort wait in staging, not in blocks; a posted receive is always sent to, if need be with filler, so that the
link's numbers have no gap.

Destination            | PARKED       | WITHDRAWN | EXPECTED     | OFFERED         | RECEIVING          | CLOSING
-----------------------+--------------+-----------+--------------+-----------------+--------------------+---------
announced by router    | -> OFFERED   | lost      | ignore       | ignore          | ignore             | ignore
  for another source   | refuse offer, -> EXPECTED| ignore       | ignore          | ignore             | ignore
offer                  | ignore       | ignore    | -> OFFERED   | ignore          | ignore             | ignore
  of another kind, or  |              |           |              |                 |                    |
  with another stamp   | refuse it    | refuse it | refuse it    | refuse it       | refuse it          | refuse it
granted by host        | -            | -         | -            | send accept     | -                  | ignore
refused by host        | -            | -         | -            | send refuse, end| -                  | ignore
chunk                  | ignore       | ignore    | ignore       | ignore          | receive, once      | ignore
  that cannot be       | ignore       | ignore    | ignore       | ignore          | send abort, CLOSING| ignore
chunk verified, written| -            | -         | -            | -               | count              | lost,
chunk is bad           | -            | -         | -            | -               | send abort, CLOSING| when last
commit                 | ignore       | ignore    | ignore       | ignore          | keep, once         | ignore
  of other blocks      | ignore       | ignore    | ignore       | ignore          | send abort, CLOSING| ignore
all written + commit   | -            | -         | -            | -               | send ack, arrived  | -
abort asked by host    | -            | -         | lost         | send refuse,lost| send abort, CLOSING| ignore
abort from the peer    | -> WITHDRAWN | ignore    | lost         | lost            | CLOSING            | ignore
link lost              | end          | end       | ignore       | lost            | CLOSING            | ignore
source left            | end          | end       | lost         | lost            | CLOSING            | ignore
deadline               | refuse, end  | end       | none: host   | send abort, lost| send abort, CLOSING| -

OFFERED starts by asking the host. The granted blocks are written in RECEIVING and CLOSING only, and only by scatters of
verified chunks: `lost` waits for those that have begun. `arrived` is said only when every granted block is written.
PARKED and WITHDRAWN are unknown to the host, so they end without a report; `refused by host` is the host's own doing.

A migration's request goes on while its blocks move, so that it has more of them in the end than in the beginning. Its
source offers with room to grow, sends blocks when they are full, and the commit says how many of the offered blocks
there are: those are waited for, chunks beyond are an error, and the rest of the grant goes back unwritten. Every other
kind commits just what it offered. A migration that outgrows its offer is aborted, and its request stays where it is.
The source is told what has been sent (`report`), so that it can stop the request when hardly anything is left.

Where `arrived` was said, the destination has the request, whether or not the source hears the ack; where `lost` was
said, it has not. A source that committed and was closed without an ack cannot know which: engine/migration_source.py.

A handoff and a migration are announced by the router; pulls and returns by the destination's own host, which has asked
for them. Where the other worker answers that it offers nothing, the destination drops what it has EXPECTED, and its
host hears of that instead (asks.py). These two are announced before anybody can offer them: one that is offered and not
known has ended since, and is not PARKED but refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.messages import TransferMessage
from protos.types import TransferKind

# Whose chunks go first where several wait for one link.
URGENCY = (TransferKind.HANDOFF, TransferKind.MIGRATE, TransferKind.PULL, TransferKind.RETURN)
ASKED_FOR = (TransferKind.PULL, TransferKind.RETURN)  # by the destination, before they are offered

# --- events of both sides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A message from the transfer's peer."""

    message: TransferMessage


@dataclass(frozen=True, slots=True)
class AbortAsked:
    reason: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due once `deadline` is reached, harmless earlier."""


# --- effects of both sides --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Send to the peer named in the message's stamp."""

    message: TransferMessage


@dataclass(frozen=True, slots=True)
class CancelWork:
    """Drop what is staged, stop gathers and scatters that have not begun; each of those is answered by its end event,
    as are in their own time the ones that have begun."""
