"""Saved posteriors on the hub: upload and download, through huggingface_hub, of the files that a posterior has."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm import card, saved
from amortlm.diagnostics import certificate
from amortlm.engine.adapter import INITIAL
from amortlm.errors import CheckpointError, ConfigError, HubError
from amortlm.language_model import EMBEDDED
from amortlm.posterior_file import FILE, is_repository
from amortlm.targets.functions import references

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
# No other file goes up or comes down: no code, no pickle, no rows, nothing about the machine.
CONFIGS = ("adapter_config.json", "config.json")
FILES = (
    *(FILE, card.FILE, certificate.FILE, *CONFIGS, "generation_config.json", INITIAL),
    *("adapter_model*.safetensors", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "*.jinja"),
)
NAMES = ("base_model_name_or_path", "_name_or_path")  # of the base model, in CONFIGS
LOCALLY = "; or share a folder: what save_pretrained or amortlm train wrote can be copied, and loads as it is"


def locate(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a saved posterior: a local folder, else the downloaded files of the repository `user/name`.

    Raises HubError where there is neither, ConfigError for the revision of a local folder."""
    folder = Path(name)
    if os.path.exists(folder):
        if revision is not None:
            raise ConfigError(
                f"{name} is a folder here, and has no revision {revision!r}: leave out the revision"
            )
        return folder
    return pull(str(name), revision, token) if is_repository(str(name)) else folder


def pull(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download a posterior into the cache of the hub. Raises HubError, and CheckpointError for another repository."""
    from huggingface_hub import snapshot_download

    with _explained(repo_id, f"{repo_id} is no folder here, and ", revision):
        folder = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(FILES))
    if not (Path(folder) / FILE).is_file():
        raise CheckpointError(
            f"{repo_id} on the hub has no {FILE}: it is not a posterior that amortlm has saved"
        )
    return Path(folder)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    allow_local_model: bool = False,
) -> str:
    """Upload a saved posterior in one commit, and return the URL of its repository; see `Posterior.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    spec = saved.read(folder)
    check_model(spec, allow_local_model)
    for sentence in not_saved(spec):
        logger.warning("%s: %s", repo_id, sentence)
    with _explained(repo_id, remedy=LOCALLY):
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        changed = _published(folder, spec, url.repo_id, api)
        operations = [
            CommitOperationAdd(file.name, changed.get(file.name, str(file)))
            for file in sorted(folder.iterdir())
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in FILES)
        ]
        message = commit_message or "Upload a posterior with amortlm"
        api.create_commit(url.repo_id, operations, commit_message=message)
    return str(url)


def check_model(spec: dict[str, Any], allow_local: bool) -> None:
    """Raise ConfigError for a posterior whose base model nobody else can load."""
    if _is_local(spec) and not allow_local:
        raise ConfigError(
            f"the base model ({spec['model'] or 'without a name'}) is on this machine only, so nobody else can use the "
            "sampler: publish the model first and save the posterior with its name, or give allow_local_model=True "
            "(--allow-local-model)"
        )


def _is_local(spec: dict[str, Any]) -> bool:
    return spec["model"] != EMBEDDED and saved.hub_id(spec["model"]) is None


def not_saved(spec: dict[str, Any]) -> list[str]:
    """Sentences about parts of the target that are not in the files."""
    if spec["target"] is None:
        why = spec.get("target_not_saved")
        return [f"the target is not saved, so samples have no weights: {why}"] if why else []
    if functions := list(dict.fromkeys(references(spec["target"]))):
        return [
            f"the target calls {', '.join(functions)}, and no code is uploaded: whoever loads the posterior must "
            "install the module and give trust="
        ]
    return []


def _published(folder: Path, spec: dict[str, Any], repo_id: str, api: HfApi) -> dict[str, bytes]:
    """The content of the files that differ from those in the folder: paths of this machine are taken out, and the card
    gets the name of the repository and the licence of the base model."""
    out = {}
    if _is_local(spec):
        out[FILE] = _json({**spec, "model": None})
        for name in CONFIGS:
            if (folder / name).is_file():
                config = json.loads((folder / name).read_text(encoding="utf-8"))
                out[name] = _json({**config, **{key: None for key in NAMES if key in config}})
    if (text := card.read(folder)) is not None:
        text = text.replace(card.PLACE, json.dumps(repo_id)).replace(
            card.CHECK, card.CHECK.replace("user/name", repo_id)
        )
        out[card.FILE] = _licensed(text, saved.hub_id(spec["model"]), api).encode()
    return out


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _licensed(text: str, base: str | None, api: HfApi) -> str:
    """A card with the licence that the hub states for the base model, if the card has none."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HTTPError

    found: Any = ModelCard(text)
    if base is None or found.data.license:
        return text
    try:
        data = api.model_info(base).card_data
    except HTTPError:  # a base model that cannot be read now: the licence stays unknown
        return text
    if data is None or not isinstance(data.license, str):
        return text
    found.data.license = data.license
    return str(found)


@contextmanager
def _explained(
    repo_id: str, prefix: str = "", revision: str | None = None, remedy: str = ""
) -> Iterator[None]:
    """Errors of huggingface_hub as a HubError of one sentence."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import HFValidationError

    try:
        yield
    except HFValidationError as e:
        raise ConfigError(f"{repo_id!r} is no name of a repository: write user/name") from e
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        raise HubError(prefix + _reason(e, repo_id, revision) + remedy) from e


def _reason(error: Exception, repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = (error, error.__cause__)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return f"the hub is not asked for {repo_id}, because HF_HUB_OFFLINE is set: unset it, or name a local folder"
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    if answered is None:
        kind = type(error.__cause__ or error).__name__
        return f"the hub cannot be reached for {repo_id} ({kind}): check the network, or name a local folder"
    status = answered.response.status_code
    if isinstance(answered, RevisionNotFoundError):
        return f"{repo_id} on the hub has no revision {revision!r}: see its branches and tags there"
    if isinstance(answered, GatedRepoError):
        return f"{repo_id} on the hub is gated: ask for access on its page, then log in (hf auth login) or give token="
    if isinstance(answered, RepositoryNotFoundError) or status == 404:
        return (
            f"the hub shows no repository {repo_id} to you ({status}): check its name, and log in (hf auth login) or "
            "give token= if it is private"
        )
    if status in (401, 403):
        return (
            f"the hub refuses this for {repo_id} ({status}): log in (hf auth login) or give token=, with a token that "
            "may do it"
        )
    return f"the hub answers with an error for {repo_id} ({status}): try again later"
