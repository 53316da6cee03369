"""Peak memory of a decode. On a GPU the allocator knows it; on a CPU a fresh process is asked for its high-water mark.

    python -m fast_latent_decoders.evaluation.memory '{"decoder": ..., "size": 512, ...}'     is that process.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
TIMEOUT = 900  # seconds


def peak_of_child(case: dict[str, Any], threads: int) -> int:
    """Bytes that loading and one decode take in a process of its own, above what its imports take. `case` is a Case's fields.

    Raises:
        RuntimeError: the process failed, or this system does not tell; one sentence says so.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fast_latent_decoders.evaluation.memory", json.dumps(case)]
    try:
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the process that was to tell took more than {TIMEOUT} s") from error
    if done.returncode < 0:
        raise RuntimeError("out of memory" if done.returncode == -9 else f"the process ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the process that was to tell failed"])[-1])
    return int(done.stdout.split()[-1])


def main(case: dict[str, Any]) -> int:
    """In the child: import, note the mark, load, decode once, and see how far the mark has moved."""
    import diffusers  # noqa: F401 - with what it imports, so that none of it is counted

    from .cases import Case, task_of
    from .subjects import Subject

    before = _reset()
    what = Case(**case)
    subject = Subject.load(what.decoder)
    # Nothing is kept beside the model that decodes, as a user would have it.
    task = task_of(what, subject, "cpu", in_place=True)
    del subject
    task()
    return max(0, _peak() - before)


def _reset() -> int:
    """Bytes in use now; where the system allows, the high-water mark starts again from here."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The high-water mark of this process in bytes."""
    if STATUS.exists():  # Linux; there ru_maxrss would remember the parent's
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError as error:
        raise RuntimeError("this system does not tell the peak memory of a process") from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_gpu(task: Any) -> int:
    """Bytes that the allocator of the CUDA device had in use at most during one call of `task`, weights and all that is there
    already included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    task()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
