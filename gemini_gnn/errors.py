"""Errors a user can do something about.

Every message says what was expected, what was found and what to do. The commands in ``launch/`` print the message
of a :class:`GeminiError` without a traceback and exit with code 2; any other exception is a bug and keeps its own.
"""


class GeminiError(Exception):
    """Base of all errors meant for the user. ``exit_code``: of the process that it ends."""

    exit_code = 2


class ConfigError(GeminiError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(GeminiError, ValueError):
    """Input data is missing, malformed or inconsistent."""


class PartitionError(GeminiError, ValueError):
    """A partitioned graph is missing, damaged, or was made for something else."""


class RunDirError(GeminiError):
    """The run directory cannot be used: unwritable, in use, or holding another run."""


class RunDirInUse(RunDirError):
    """Another start has it, and lives."""


class ClusterError(GeminiError):
    """Machines or ranks cannot be found, reached or agreed upon."""


class ExchangeError(GeminiError):
    """A halo exchange failed or timed out."""


class PeerLost(ClusterError, ExchangeError):
    """Another rank, or the way to it, is gone: a consequence of something that happened there."""


class SnapshotError(GeminiError):
    """A snapshot cannot be taken, trusted or restored."""


class DamagedSnapshot(SnapshotError):
    """A copy in this job's memory was damaged and is voided: the next start of the trainers fetches a good one."""


class RecoveryError(GeminiError):
    """The worker agent or its trainers cannot be started, reached or stopped."""
