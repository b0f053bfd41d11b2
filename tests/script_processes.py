"""Root scripts in processes of their own: killed in the middle, two at once, with data loaders that start by spawn.

A new Python imports torch, transformers and a script for seven seconds. Where processes can fork, a server has imported
them once and every process here begins as its copy; on Windows each one starts anew.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("utils.threads", "Training_SPDNet_Adaptation", "Training_FeatureDerain", "Training_Conditional",
            "train_unet_derain", "train_seg_stage2")
PATIENCE = 300  # seconds


def killed_at(script, settings, batch):
    """Run a script's main with {constant: value} in a process of its own, which kills itself (SIGKILL, where there is
    one) when it computes the losses of that batch, counted from 1; 0: never. -> its exit code"""
    (process, _), = _started(script, settings, [{}], die=batch)
    return _code_of(process)


def with_spawned_loaders(script, settings):
    """Run a script's main in a process whose data loaders start their workers by spawn, as on Windows and macOS."""
    (process, log), = _started(script, settings, [{}], spawn=True)
    assert _code_of(process) == 0, log.read_text(encoding="utf-8")[-3000:]


def on_two_processes(script, settings):
    """Run a script's main in two processes on gloo, which find each other as torchrun's do. -> what they printed"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "USE_LIBUV": "0", "ACCELERATE_USE_CPU": "true"}
    ranks = _started(script, settings, [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")])
    codes = [_code_of(process) for process, _ in ranks]
    printed = "".join(log.read_text(encoding="utf-8") for _, log in ranks)
    assert codes == [0, 0], printed[-3000:]
    return printed


def under_torchrun(script, settings, *options):
    """Run a root script under torchrun on gloo, with flags for {constant: value}. -> what it printed

    options: of torchrun; without any two processes on this machine.
    """
    return _printed_by(_torchrun(script, settings, options or ("--standalone", "--nproc-per-node", "2")))


def on_two_nodes(script, settings):
    """Run a root script as on two machines with one process each: two torchruns. -> what each printed"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [_torchrun(script, settings, ("--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1",
                                          "--master-addr", "127.0.0.1", "--master-port", port)) for rank in "01"]
    return [_printed_by(node) for node in nodes]


def _torchrun(script, settings, options):
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, f"{script}.py", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "USE_LIBUV": "0", "ACCELERATE_USE_CPU": "true"})


def _printed_by(process):
    try:
        printed, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-3000:]
    return printed


# ---- the processes ---------------------------------------------------------------------------------------------

def started(function, *args, **kwargs):
    """-> a process that runs a test module's function."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def _started(script, settings, environments, **how):
    """-> [(process, file with what it prints), ...], one per environment."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    found = []
    for number, environment in enumerate(environments):
        log = Path(next(settings[name] for name in ("RUNS_DIR", "OUTPUT_DIR", "CHECKPOINT_DIR", "OUTPUT")
                        if settings.get(name)))
        log = log.with_name(f"printed_{log.name}_{number}.txt")
        found.append((started(_run, script, settings, environment, log, **how), log))
    return found


def finished(process, log):
    """Wait for a process that prints into the file `log`. -> what it printed; AssertionError where it failed"""
    code, printed = _code_of(process), log.read_text(encoding="utf-8", errors="replace")
    assert code == 0, printed[-3000:]
    return printed


def _code_of(process):
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {PATIENCE} seconds")
    return process.exitcode


def _run(script, settings, environment, log, die=0, spawn=False):
    """What a process does: everything that it prints goes to `log`."""
    os.environ.update(environment)
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    if spawn:
        multiprocessing.set_start_method("spawn", force=True)
    module = importlib.import_module(script)
    if die:
        _die_at(module, die)
    module.main(**settings)


def _die_at(module, batch):
    """Let the process kill itself when `module` computes the losses of that batch, counted from 1."""
    plain, calls = module.compute_losses, 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == batch:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return plain(*args, **kwargs)
    module.compute_losses = counted
