"""Write an exported program as ONNX, in float32, float16 or INT8, and run the file: what export.py, rfdetr/detr.py and
utils/inference/exported.py share."""

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import warnings

import torch

from utils.config import UserError

ABOUT = "rainsight"  # key of what a file says of itself, as JSON: see utils/inference/exported.py
LARGEST = 2**31 - 2**20  # bytes of weights that one ONNX file takes; beyond it they lie in a file of their own
OLDEST_OPSET = 18   # torch's exporter writes 18; its conversion of detectors to 17 fails, and 18 is what it then writes


def require_opset(opset, constant):
    """UserError for an opset that cannot be written; constant: the name to complain about."""
    if not isinstance(opset, int) or opset < OLDEST_OPSET:
        raise UserError(f"{constant} = {opset!r}: torch's exporter writes these detectors with {OLDEST_OPSET} or newer")
    if importlib.util.find_spec("onnx"):
        import onnx
        if opset > (newest := onnx.defs.onnx_opset_version()):
            raise UserError(f"{constant} = {opset}: this onnx ({onnx.__version__}) knows opsets up to {newest}")


def require_packages(what, otherwise="", names=("onnx", "onnxscript", "onnxruntime")):
    """UserError that says what to install where an optional package is missing; what: names who needs it."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"{what} needs the package {name}: pip install -r requirements-export.txt"
                            f"{otherwise}") from None


def export_program(model, images, dynamic=None):
    """-> torch.export's program of a module with plain tensors in and out.

    Args:
        images: (B, 3, H, W), an example; its shape is fixed but for `dynamic`, {dimension: torch.export.Dim}, for which
            it should have 2 or more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch and transformers that a user cannot act on
        return torch.export.export(model, (images,), dynamic_shapes=dynamic and (dynamic,), strict=False)


def write(program, path, opset, input_name, output_names, about=None):
    """Write ONNX. -> callable of the file that was written: images -> [Tensor, ...], by onnxruntime on the CPU.

    about: plain data that the file carries under the key ABOUT, or None. Weights of more than LARGEST bytes are written
    beside it, as <path>.data, which belongs to the file.
    """
    import onnx

    weights = sum(one.numel() * one.element_size() for one in program.state_dict.values())

    for name in ("torch.onnx", "onnxscript"):  # remarks on torchvision's operators, which are not used, and on splits
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it counts what it folds
        warnings.simplefilter("ignore")
        torch.onnx.export(program, f=str(path), opset_version=opset, dynamo=True, external_data=weights > LARGEST,
                          verbose=False, input_names=[input_name], output_names=list(output_names))
    model = onnx.load(path, load_external_data=False)
    found = next(entry.version for entry in model.opset_import if entry.domain == "")
    if found != opset:  # torch only logs that its conversion failed
        raise UserError(f"opset {opset} was asked for, torch's exporter wrote {found}: choose {found}")
    if about is not None:
        onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
        onnx.save(model, path)
    opened = session(path)
    return lambda images: [torch.from_numpy(a) for a in opened.run(None, {input_name: images.numpy()})]


def session(path, threads=0):
    """-> onnxruntime's session of a file, on the CPU; threads: 0 for as many as there are cores."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings of its optimiser about what it leaves as it is
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def write_half(source, target):
    """Write a float32 file's weights and arithmetic as float16; inputs and outputs stay float32. For GPUs: on a CPU
    onnxruntime computes most of it in float32 again."""
    import onnx
    from onnxruntime.transformers import float16
    logging.getLogger("onnxruntime.transformers.float16").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights below 6e-8 become that
        model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
    done = set()  # it writes the same cast twice where a value has two readers that stay in float32
    nodes = [node for node in model.graph.node if not (set(node.output) & done or done.update(node.output))]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def write_int8(source, target, images, operators, parts, kept=(), ends=False):
    """Write a float32 file with INT8 in its heavy parts: weights per channel, activations by their range.

    Args:
        images: iterable of (1, 3, H, W) float32 arrays in [0, 1] to calibrate on.
        operators: "Conv" and, for transformers, "MatMul" (those with weights).
        parts: names of modules, such as "backbone" or "refiner.net"; what is elsewhere stays in float32, as RT-DETR's
            decoder has to: in INT8 it keeps 4 of 48 mAP.
        kept: names of modules within `parts` that stay in float32 all the same; ends: whether the first and the last
            of the operators of each part do, which see and make the pixels of an image.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    name = model.graph.input[0].name

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = iter(images)

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {name: image}

    weights = {tensor.name for tensor in model.graph.initializer}
    heavy = [node for node in model.graph.node if node.op_type in operators]
    chains = [[node.name for node in heavy if weights & set(node.input) and _within(node, (part,))] for part in parts]
    outer = {name for chain in chains if ends and chain for name in (chain[0], chain[-1])}
    floats = [node.name for node in heavy if node.name in outer or not weights & set(node.input)
              or not _within(node, parts) or _within(node, kept)]
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # advice to fold what utils/networks/folding.py has folded
    try:
        quantization.quantize_static(
            source, target, Images(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=list(operators),
            per_channel=True, activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=floats)
    finally:
        logging.getLogger().setLevel(level)
    written = onnx.load(target)
    if not any(node.op_type == "QuantizeLinear" for node in written.graph.node):
        raise UserError(f"nothing in it could be quantised: no {' or '.join(operators)} lies in {' or '.join(parts)}")
    onnx.helper.set_model_props(written, {entry.key: entry.value for entry in model.metadata_props})
    onnx.save(written, target)


def _within(node, parts):
    """-> whether a node comes from a module with one of these names, as torch's exporter notes beside it."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    return any(f".{part}." in f".{scope}." for scope in ast.literal_eval(scopes) for part in parts)


def difference(outputs, expected):
    """-> the largest absolute difference of two lists of (B, Q, ...) outputs. Queries are compared in order of their
    values, because equally good ones may swap places."""
    return largest((ours.sort(1).values - theirs.sort(1).values).abs().max().item()
                   for ours, theirs in zip(outputs, expected, strict=True))


def largest(differences):
    """-> the largest of some numbers, NaN where one of them is (Python's max may pass over it)."""
    return torch.tensor(list(differences), dtype=torch.float64).max().item()
