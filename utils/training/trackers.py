"""Where the curves of a run go: TensorBoard's files in its folder, experiment trackers through Accelerate's classes.

A tracker that is not there is an error before anything else is done; one that fails in the middle of a training is
left out from then on, since no curve is worth a run.
"""

import importlib.util

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch.utils.tensorboard import SummaryWriter

from utils import processes
from utils.config import UserError

KNOWN = ("tensorboard", "wandb", "mlflow", "trackio")  # each the name of its package as well
PROJECT = "RainSight"  # what the trackers call the group of all runs


def require(name, chosen):
    """UserError unless a constant holds some of KNOWN whose packages are installed."""
    if not isinstance(chosen, (tuple, list)) or not all(one in KNOWN for one in chosen):
        raise UserError(f"{name} = {chosen!r}: choose some of {', '.join(KNOWN)}, such as {name} = "
                        "('tensorboard',), or () for none")
    for one in chosen:
        found = importlib.util.find_spec(one)
        if found is None or found.origin is None:  # the latter: only a folder of that name, such as wandb's own ./wandb
            raise UserError(f"{name}: the package {one} is missing: pip install {one}, or leave '{one}' out")


class Trackers:
    """All of a run's, on the main process; on the others there are none.

    Args:
        chosen: some of KNOWN; folder: Path of the run, whose name is the run's; constants: {name: value};
        step: optimizer steps that are done already.
    Raises:
        UserError: one of them does not start.
    """

    def __init__(self, chosen, folder, constants, step):
        self.board, self.others = None, {}
        if not processes.is_main():
            return
        if "tensorboard" in chosen:
            self.board = SummaryWriter(folder / "tb", purge_step=step)
        for name in dict.fromkeys(chosen):
            if name != "tensorboard":
                self.others[name] = self._started(name, folder, constants)

    def _started(self, name, folder, constants):
        options = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name},
                   "mlflow": {"run_name": folder.name}}[name]
        try:
            tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **options)
            tracker.start()
            tracker.store_init_configuration({key: value if isinstance(value, (bool, int, float, str)) else str(value)
                                              for key, value in constants.items()})
        except Exception as error:  # each has its own: no login, no connection, a database of another version
            self.close()
            raise UserError(f"TRACKERS: {name} does not start ({_line(error)}): log in or set it up as its own "
                            f"documentation says, or leave '{name}' out") from error
        return tracker

    def step(self, values, step):
        """{name: number} of an optimizer step."""
        self._board_scalars(values, step)
        self._log(values, step)

    def epoch(self, values, epoch, step, pictures):
        """{name: number} of an epoch. TensorBoard counts epochs, the others, which want one axis for all, steps.

        Args:
            pictures: {tag: (3, H, W) float in [0, 1]}, for TensorBoard alone.
        """
        self._board_scalars(values, epoch)
        self._log(values, step)
        if self.board:
            for tag, picture in pictures.items():
                self.board.add_image(tag, picture.clamp(0, 1), epoch)
            self.board.flush()

    def close(self):
        """Everything is written; once more does nothing."""
        if self.board:
            self.board.close()
        for name, tracker in self.others.items():
            try:
                tracker.finish()
            except Exception as error:
                processes.say(f"note: TRACKERS: {name} did not end well ({_line(error)})")
        self.board, self.others = None, {}

    def _board_scalars(self, values, at):
        if self.board:
            for name, number in values.items():
                self.board.add_scalar(name, number, at)

    def _log(self, values, step):
        for name, tracker in list(self.others.items()):
            try:
                tracker.log(values, step=step)
            except Exception as error:
                processes.say(f"note: TRACKERS: {name} failed ({_line(error)}) and is left out from here on")
                del self.others[name]


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
