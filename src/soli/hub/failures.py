"""What goes wrong between this machine and the hub, as one sentence each."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from soli.errors import SoliError
from soli.hub.cache import ModelId


@contextmanager
def hub_failures(model: ModelId) -> Iterator[None]:
    """Errors of huggingface-hub, of HTTP and of the disk, while something about a model is asked for, as SoliErrors."""
    try:
        yield
    except SoliError:
        raise
    except Exception as error:
        raise SoliError(f"{model}: {_sentence(error, model)}") from error


def _sentence(error: Exception, model: ModelId) -> str:
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _sentence(cause, model)
    hub = constants.ENDPOINT
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it and run soli pull again"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms at {hub}/{model.repo}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.DisabledRepoError):
        return f"{hub} has disabled this model: see {hub}/{model.repo}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return _status(401, hub)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {model.revision or 'main'!r}: see {hub}/{model.repo} for its branches and tags"
    if isinstance(error, errors.EntryNotFoundError):
        return "a file that the hub lists is not there: it may have changed just now, so run soli pull again"
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error.response.status_code, hub)
    if isinstance(error, errors.FileMetadataError):
        return f"{hub} does not answer as a Hugging Face hub: see HF_ENDPOINT, or a proxy between"
    return _transport(error, hub)


def _status(status: int, hub: str) -> str:
    if status in (401, 404):  # the hub does not tell a missing model from a private one
        return f"{hub} has no such model, or it is private: check the ID, or set HF_TOKEN to a token that may read it"
    if status == 403:
        return f"{hub} refuses it with status {status}: set HF_TOKEN to a token that may read it"
    if status == 429:
        return f"{hub} has answered too many requests of yours (status 429): wait some minutes"
    return f"{hub} answers with status {status}: try again later"


def _transport(error: Exception, hub: str) -> str:
    """Errors of the connection, of the disk, and of answers that are none of a hub."""
    name = type(error).__name__
    if type(error).__module__.partition(".")[0].startswith("httpx"):
        if name in ("RemoteProtocolError", "ReadError", "ReadTimeout", "WriteError"):
            return "the transfer ended early: run soli pull again, which resumes it"
        return f"{hub} cannot be reached ({str(error) or name}): check the network, or HF_ENDPOINT"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: make space and run soli pull again, which resumes"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "the transfer ended early: run soli pull again, which resumes it"
    if isinstance(error, ValueError | KeyError | TypeError | AttributeError | AssertionError):
        return f"{hub} does not answer as a Hugging Face hub ({name}): see HF_ENDPOINT"
    return f"{name}: {error}"
