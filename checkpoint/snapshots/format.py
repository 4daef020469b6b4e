"""The number of all that a snapshot process shares with those who meet it: requests, segments, fragments, what lies
where in a slot. Whatever of it changes, the number does.

[Note: another version of Atoll]
A snapshot process lives on after its job, and may be met by a job of other code. Three things are the same under every
number, for that they may part in peace: how a connection begins (`Wire.connect`), frames, and the request ``drop``, by
which the process ends and gives its memory back. Every other request is refused before both sides have agreed on the
number. Nothing that was made under another number is read: a job that finds it drops it and goes on from storage.
"""

FORMAT = 3

OTHER_VERSION = "the snapshots in memory are of another version of Atoll and cannot be read: they are dropped"
