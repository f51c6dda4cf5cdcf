"""Every way in which merger says no. Knows exit codes and HTTP statuses; knows nothing of who raises what.

MergerError
|-- RequestError            what was asked cannot be done; nothing was written          exit 2, HTTP 422
|   |-- RecipeError         the recipe is not well formed
|   |-- SourceError         a model cannot be read
|   |   |-- FormatError     a checkpoint file breaks the format
|   |   `-- PickledWeights  the weights are a pickle
|   |-- IncompatibleSources the models do not fit together
|   |-- UnsupportedModel    the method cannot be used on this model
|   |-- NotInstalled        it needs a package that is not there
|   |-- OutputOccupied      the output folder holds something else
|   |-- NotEnoughDisk       the result would not fit on the disk
|   |-- NotEnoughMemory     the work does not fit into the memory that was allowed
|   |-- LicenseRefused      the licences of the sources forbid it, or nobody has accepted them
|   `-- NonFiniteInput      a source holds NaN or infinity and --strict was asked
|-- JobError                the work was begun and failed                               exit 1, HTTP 500
|   |-- ReadFailed          a source could not be read to its end
|   |-- WriteFailed         the output could not be written
|   |-- SourceChanged       a source changed after it was planned
|   |-- ServiceFailed       the job service did not answer, or failed
|   |-- WorkerDied          the processes that worked on a shard or a stage died again and again
|   |-- VerificationFailed  what was written is not what was planned
|   `-- NotGoodEnough       the result does not measure what was required of it
`-- Interrupted             stopped on request; the next run goes on                    exit 130, HTTP 409
"""


class MergerError(Exception):
    """The root: a message, the place it is about (file, tensor or field), and the remedy."""

    remedy = ""

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        if remedy:
            self.remedy = remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n{self.remedy}" if self.remedy else ""
        return f"{place}{self.message}{advice}"


class RequestError(MergerError):
    """What was asked cannot be done; nothing was written."""


class RecipeError(RequestError):
    """The recipe is not well formed. `where` is the field's path."""

    remedy = "`merger methods NAME` lists the fields of a method with an example."
    within: object = None  # the recipe that the path is of, where it may be one within another


class SourceError(RequestError):
    """A model cannot be read. `where` is the file or folder."""


class FormatError(SourceError):
    """A checkpoint file breaks the format. `where` is the file, with the tensor where one is to blame."""

    remedy = "Download or save this file again: reading past the damage would give wrong weights without a word."


class PickledWeights(SourceError):
    """The weights are a pickle, which can run code when it is read."""

    remedy = (
        "Convert it where you trust it, then use the converted folder:\n"
        '  python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('FOLDER', dtype='auto').save_pretrained('CONVERTED')\""
    )


class IncompatibleSources(RequestError):
    """The models do not fit together. `where` is the tensor, file or config key that differs."""


class UnsupportedModel(RequestError):
    """The method cannot be used on this model. `where` is the config's key, the tensor or the model."""

    remedy = "docs/surgery.md lists what can be done with which family of models."


class NotInstalled(RequestError):
    """What was asked needs a package that is not installed."""

    remedy = "pip install 'merger[torch]'"


class OutputOccupied(RequestError):
    """The output folder holds something else, which merger never overwrites."""

    remedy = "Choose another folder with -o, or remove that one yourself."


class NotEnoughDisk(RequestError):
    """The result would not fit on the disk."""

    remedy = "Free some space, choose another disk with -o, or ask for a smaller `output.dtype`."


class NotEnoughMemory(RequestError):
    """The work does not fit into the memory that was allowed."""


class LicenseRefused(RequestError):
    """The licences of the sources forbid to pass the result on, or nobody has accepted what they ask for."""


class NonFiniteInput(RequestError):
    """A source holds NaN or infinity and --strict was asked."""

    remedy = "Leave that checkpoint out, or run without --strict to carry the values over with a warning."


class JobError(MergerError):
    """The work was begun and failed."""


class ReadFailed(JobError):
    """A source could not be read to its end."""


class WriteFailed(JobError):
    """The output could not be written."""

    remedy = "Finished shards are kept: run the same command again once the cause is gone."


class SourceChanged(JobError):
    """A source changed after it was planned."""

    remedy = "Run again when nothing writes to the sources any more."


class ServiceFailed(JobError):
    """The job service did not answer, or failed."""

    remedy = "Is `merger serve` running? Its address comes from MERGER_SERVER, --server or the config file."


class WorkerDied(JobError):
    """The processes that worked on a shard or a stage died again and again."""

    remedy = "Look at the job's log and at the memory of the machines; a retry goes on from what is finished."


class VerificationFailed(JobError):
    """What was written is not what was planned."""


class NotGoodEnough(JobError):
    """The result does not measure what was required of it."""

    remedy = "Ask for less in `evaluate`, or change the recipe. Finished shards are kept for the next run."


class Interrupted(MergerError):
    """Stopped on request."""

    remedy = "Finished shards are kept: run the same command again to go on."


# One table from errors to the outside, the nearest ancestor counts: (exit code, HTTP status).
OUTSIDE: dict[type[MergerError], tuple[int, int]] = {
    RequestError: (2, 422),
    JobError: (1, 500),
    Interrupted: (130, 409),
}


def exit_code(error: MergerError) -> int:
    """The exit code of the command for an error: 2 the request was wrong, 1 the job failed, 130 interrupted."""
    return next((OUTSIDE[kind][0] for kind in type(error).__mro__ if kind in OUTSIDE), 1)
