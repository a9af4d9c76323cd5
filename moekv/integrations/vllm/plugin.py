"""The entry point ``vllm.general_plugins``, which vLLM calls in each of its processes."""

from __future__ import annotations

from logging import getLogger

TESTED = "0.32"
"""The minor version of vLLM whose hooks these are."""

# Below vLLM's own logger, which alone has a handler in all of its processes.
logger = getLogger("vllm.moekv")


def is_tested(version: str) -> bool:
    """Return whether a version of vLLM is one whose hooks are known."""
    return version.split(".")[:2] == TESTED.split(".")


def check_version() -> None:
    """Raise ``RuntimeError`` unless vLLM is of the tested minor version."""
    import vllm

    if not is_tested(vllm.__version__):
        raise RuntimeError(
            f"moekv: expected vLLM {TESTED}.*, whose hooks it was tested with, "
            f"got {vllm.__version__}"
        )


def register() -> None:
    """Register the classes that vLLM uses; without moekv's option they are vLLM's own.

    On an unsupported platform or version of vLLM nothing is registered, with a warning: moekv may
    be installed without being used.
    """
    import vllm
    from vllm.platforms import current_platform

    reason = None
    if not is_tested(vllm.__version__):
        reason = f"vLLM {TESTED}.*, got {vllm.__version__}"
    elif not current_platform.is_cpu():
        reason = f"vLLM on CPUs, got {current_platform.device_type}"
    if reason is not None:
        logger.warning(
            'moekv stays off, and additional_config={"moekv": ...} does nothing: expected %s',
            reason,
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # The scheduler has to know the spec by name before a worker sends one.
    from moekv.integrations.vllm import manager, scheduler

    manager.register()
    scheduler.register()
    register_backend(AttentionBackendEnum.CPU_ATTN, "moekv.integrations.vllm.backend.Backend")
