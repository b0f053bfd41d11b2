"""Write an exported program as ONNX and run the file: what export.py and rfdetr/detr.py share."""

import importlib
import importlib.util
import logging
import warnings

import torch

from utils.config import UserError

OLDEST_OPSET = 18   # torch's exporter writes 18; its conversion of detectors to 17 fails, and 18 is what it then writes


def require_opset(opset, constant):
    """UserError for an opset that cannot be written; constant: the name to complain about."""
    if not isinstance(opset, int) or opset < OLDEST_OPSET:
        raise UserError(f"{constant} = {opset!r}: torch's exporter writes these detectors with {OLDEST_OPSET} or newer")
    if importlib.util.find_spec("onnx"):
        import onnx
        if opset > (newest := onnx.defs.onnx_opset_version()):
            raise UserError(f"{constant} = {opset}: this onnx ({onnx.__version__}) knows opsets up to {newest}")


def require_packages(what, otherwise=""):
    """UserError that says what to install where an optional package is missing; what: names who needs it."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"{what} needs the package {name}: pip install onnx onnxscript onnxruntime"
                            f"{otherwise}") from None


def export_program(model, images):
    """-> torch.export's program of a module with plain tensors in and out, for images of this shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch and transformers that a user cannot act on
        return torch.export.export(model, (images,), strict=False)


def write(program, path, opset, input_name, output_names):
    """Write ONNX. -> callable of the file that was written: images -> [Tensor, ...], by onnxruntime on the CPU."""
    import onnx
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # remarks on torchvision's operators, which are not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, f=str(path), opset_version=opset, dynamo=True, external_data=False, verbose=False,
                          input_names=[input_name], output_names=list(output_names))
    found = next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    if found != opset:  # torch only logs that its conversion failed
        raise UserError(f"opset {opset} was asked for, torch's exporter wrote {found}: choose {found}")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(a) for a in session.run(None, {input_name: images.numpy()})]


def difference(outputs, expected):
    """-> the largest absolute difference of two lists of (B, Q, ...) outputs. Queries are compared in order of their
    values, because equally good ones may swap places."""
    return max((ours.sort(1).values - theirs.sort(1).values).abs().max().item()
               for ours, theirs in zip(outputs, expected, strict=True))
