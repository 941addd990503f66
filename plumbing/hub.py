"""hub.py -- files of a dataset on the Hugging Face hub.

Promises that a file which has its name is the hub's file, whole: requests are repeated, a download
that was cut off is gone on with, size and SHA-256 are compared, and only then the file gets its
name by a rename. What cannot be mended is one line (UserError) that says what to do: no such file,
access refused, no way to the hub, a proxy that cannot be used, a full disk.
"""

import os
import re
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path

from plumbing.checkpoints import sha256_of
from plumbing.knobs import UserError

T = typing.TypeVar("T")
ATTEMPTS = 3  # per request; inside one attempt the library resumes a dropped connection by itself
OWN_TEXT = (
    "train on a text file or folder of your own, or on the embedded corpus, which needs no download"
)
PROXIES = ("all_proxy", "https_proxy", "http_proxy")


def _hub() -> types.ModuleType:
    """The library, imported late: it takes a third of a second and most runs need none of it."""
    # Plain HTTP, the way whose faults tests/hub_server.py acts out.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _refusal(url: str, status: int | None) -> str:
    """What an HTTP status means that another attempt will not change; '' for the others."""
    if status in (401, 403):
        return (
            f"{url}: access was refused (HTTP {status}); set HF_TOKEN to a token of an account "
            f"that may read it (accept the terms on the dataset's page), or check HF_ENDPOINT"
        )
    if status == 404:
        return f"{url}: the hub has no such file (HTTP 404); ask for others, or check HF_ENDPOINT"
    return ""


def _proxy_problem(error: BaseException) -> str:
    """What to say of an error that the proxy settings cause before any request is made; '' where
    the environment names no proxy."""
    names = [name for name in (*PROXIES, *map(str.upper, PROXIES)) if os.environ.get(name)]
    if not names:
        return ""
    settings = ", ".join(f"{name}={os.environ[name]}" for name in names)
    advice = "correct or unset it"
    if "socks" in str(error).lower():
        advice = "pip install socksio, or unset it"
    return f"the proxy of the environment cannot be used ({settings}: {error}); {advice}"


def hub_persist(repo: str, name: str, attempt: Callable[[], T], otherwise: str) -> T:
    """attempt(), up to ATTEMPTS times, for file `name` of dataset `repo` ('' for a listing).

    `otherwise` says what can be done without the hub. Raises UserError: at once for what will not
    heal (no such file, access refused, a bad proxy, a full disk, offline mode), else at last.
    """
    hub = _hub()
    url = hub.hf_hub_url(repo, name, repo_type="dataset") if name else f"dataset {repo}"
    what_failed = name or repo
    for number in range(1, ATTEMPTS + 1):
        damaged = False
        try:
            return attempt()
        except UserError as error:
            damaged = True
            fault = str(error)
        except (hub.errors.HTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if refusal := _refusal(url, status):
                raise UserError(refusal) from None
            if isinstance(error, OSError) and error.errno is not None:
                # The network's errors carry no errno here, so this one is the disk's.
                raise UserError(f"{what_failed}: cannot be written: {error}") from None
            fault = _in_one_line(error)
            if isinstance(error, hub.errors.OfflineModeIsEnabled):
                break
        except (ImportError, ValueError) as error:
            raise UserError(_proxy_problem(error) or f"{url}: {_in_one_line(error)}") from None
        if number < ATTEMPTS:
            print(
                f"{what_failed}: attempt {number} of {ATTEMPTS} failed, trying again: {fault}",
                flush=True,
            )
            time.sleep(number)
    if damaged:
        raise UserError(f"{url}: {ATTEMPTS} downloads were all bad, giving up. The last: {fault}")
    raise UserError(
        f"{url}: no answer, or a broken one ({fault}). Rerun to go on; with no way to the hub, set "
        f"HF_ENDPOINT to a mirror, or {otherwise}"
    )


def hub_list(repo: str, prefix: str = "", otherwise: str = OWN_TEXT) -> list[str]:
    """Names of the dataset's files that start with `prefix`, sorted. Raises UserError when the hub
    does not answer or has none."""

    def attempt() -> list[str]:
        return list(_hub().HfApi().list_repo_files(repo, repo_type="dataset"))

    files = hub_persist(repo, "", attempt, otherwise)
    found = sorted(name for name in files if name.startswith(prefix))
    if not found:
        raise UserError(
            f"dataset {repo}: none of its {len(files)} files starts with {prefix!r}; "
            f"is the name right?"
        )
    return found


def hub_facts(repo: str, name: str, otherwise: str = OWN_TEXT) -> typing.Any:
    """The hub's size in bytes, commit, and etag, which for large files is the SHA-256."""
    hub = _hub()
    url = hub.hf_hub_url(repo, name, repo_type="dataset")
    facts = hub_persist(repo, name, lambda: hub.get_hf_file_metadata(url), otherwise)
    if facts.size is None:
        raise UserError(
            f"{facts.location}: the answer has no size; is HF_ENDPOINT a mirror of the hub?"
        )
    return facts


def hub_problem(path: Path, facts: typing.Any) -> str:
    """What keeps `path` from being the hub's file of these facts; '' if nothing does."""
    size = path.stat().st_size
    if size != facts.size:
        return f"{path}: {size:,} bytes, but the hub's file has {facts.size:,}"
    # An etag of another form (small files, or a mirror that stores in its own way) is no SHA-256.
    is_sha256 = re.fullmatch("[0-9a-f]{64}", facts.etag or "") is not None
    if is_sha256 and sha256_of(path) != facts.etag:
        return (
            f"{path}: right length, wrong bytes: its SHA-256 is not the hub's {facts.etag[:12]}..."
        )
    return ""


def hub_fetch(
    repo: str,
    name: str,
    path: Path,
    check: Callable[[Path, typing.Any], str] = hub_problem,
    otherwise: str = OWN_TEXT,
    facts: typing.Any = None,
) -> None:
    """Download file `name` of dataset `repo` and give it the name `path` once check(file, facts)
    finds nothing wrong. A download that was cut off is gone on with. Raises UserError as
    hub_persist does."""
    hub = _hub()
    facts = facts or hub_facts(repo, name, otherwise)
    # The library checks the size only, and copies from its cache straight to the final name: hence
    # a folder of our own for both.
    part = path.parent / ".part"

    def attempt() -> Path:
        file = hub.hf_hub_download(
            repo,
            name,
            repo_type="dataset",
            revision=facts.commit_hash,
            local_dir=part,
            cache_dir=part / "cache",
        )
        fault = check(Path(file), facts)
        if fault:
            os.unlink(file)  # else the library would call it present
            raise UserError(fault)
        return Path(file)

    path.parent.mkdir(parents=True, exist_ok=True)
    file = hub_persist(repo, name, attempt, otherwise)
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    os.replace(file, path)
