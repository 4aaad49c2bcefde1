"""Push a model folder to a hub, as it is; private unless others are to read it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi

from gblm.checkpoint.inspect import verify
from gblm.errors import MachineError, UsageError
from gblm.model.folder import ModelFolder

# What an earlier push left; of weights every file is loaded that is there.
STALE = "*.safetensors*"


def export_hub(source: ModelFolder, repo: str, public: bool = False) -> dict[str, Any]:
    """Make the repository if there is none, and push every file of the folder in one commit.

    Args:
        source: a packed folder, which is verified first, or any other model folder.
        repo: NAME, or OWNER/NAME, on the hub of HF_ENDPOINT.
        public: whether everybody may read it.

    Returns:
        "repo", "private", "commit" and its "url".

    Raises:
        CheckpointError: the folder is damaged.
        MachineError: the hub cannot be reached, or refuses.
        UsageError: the repository is there and public, though `public` is not set.
    """
    if source.kind == "packed":
        verify(source)
    hub = HfApi()
    try:
        name = hub.create_repo(repo, private=not public, exist_ok=True).repo_id
        private = bool(hub.model_info(name).private)
        if not private and not public:
            raise UsageError(
                f"{name} is there already, and everybody can read it: pass --public, or choose "
                "another name."
            )
        done = hub.upload_folder(
            repo_id=name, folder_path=source.path, commit_message=f"Upload {source.name}",
            delete_patterns=STALE,
        )  # fmt: skip
    except UsageError:
        raise
    except Exception as error:  # of the network, the hub, or its client: there are many
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise MachineError(
            f"{repo}: the hub did not take the folder ({type(error).__name__}: {reason[0]}). "
            "`hf auth login`, or HF_TOKEN, gives the right to write."
        ) from error
    return {"repo": name, "private": private, "commit": done.oid, "url": done.commit_url}
