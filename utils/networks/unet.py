"""U-Net that takes rain off a windshield.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015, in the form of the
plan: five levels of two Conv-BN-ReLU, max-pooling down, transposed convolutions up, concatenated skips, tanh. Different
from the paper: padded convolutions (the output is as large as the input), BatchNorm, optional dropout at the two
deepest levels, and by default the network predicts the correction of its input, starting from none at all.
`arch` may also name an encoder of segmentation_models_pytorch, whose U-Net then takes the plain one's place.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils import checkpoint
from utils.config import UserError
from utils.networks.clamp import clamp_with_return
from utils.networks.tiling import to_multiple

LEVELS = 4  # halvings of the plain U-Net: 64-128-256-512 and a bottleneck of 1024 for width 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def double_conv(inputs, outputs, dropout=0.0):
    """Two 3x3 Conv-BN-ReLU: (B, inputs, h, w) -> (B, outputs, h, w)."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.Dropout2d(dropout)] if dropout else []))


class UNet(nn.Module):
    """The plan's encoder-decoder: (B, 3, H, W) -> (B, 3, H, W) before the tanh; H and W multiples of 16."""

    def __init__(self, width=64, dropout=0.0):
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS + 1)]  # 64, 128, 256, 512, 1024
        drops = [0.0] * (LEVELS - 1) + [dropout] * 2
        self.down = nn.ModuleList(double_conv(inputs, outputs, drop) for inputs, outputs, drop in
                                  zip([3, *widths[:-1]], widths, drops, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
        self.merge = nn.ModuleList(double_conv(2 * w, w, drop) for w, drop in
                                   zip(widths[:-1], drops[:-1], strict=True))
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))  # (B, width * 2^level, H / 2^level, W / 2^level)
            skips.append(x)
        for level in reversed(range(LEVELS)):
            x = self.merge[level](torch.cat([skips[level], self.up[level](x)], 1))
        return self.head(x)


class EncoderUNet(nn.Module):
    """U-Net around an encoder of segmentation_models_pytorch (Iakubovskii 2019); H and W multiples of 32."""

    def __init__(self, encoder, dropout=0.0):
        super().__init__()
        self.net = _smp().Unet(encoder, encoder_weights=None, in_channels=3, classes=3)
        self.dropout = nn.Dropout2d(dropout)

    @property
    def head(self):
        """The convolution to RGB."""
        return self.net.segmentation_head[0]

    def forward(self, x):
        *skips, deepest = self.net.encoder(x)
        return self.net.segmentation_head(self.net.decoder([*skips, self.dropout(deepest)]))


class UNetDerainer(nn.Module):
    """Rainy image in, clean image out, in this project's unit: the one place that knows the network's own.

    Args:
        arch: "unet", or an encoder's name such as "resnet34".
        width: channels of the plain U-Net's first level (64 in the plan); encoders have their own.
        dropout: share of channels that training drops at the deepest levels; 0.2 to 0.3 against overfitting.
        residual: True predicts the correction (output = input + tanh), False the image (output = tanh as [-1, 1]).
    """

    def __init__(self, arch="resnet34", width=64, dropout=0.0, residual=True):
        super().__init__()
        if width < 1:
            raise UserError(f"BASE_WIDTH = {width}: choose 1 or more, such as 64")
        if not 0 <= dropout < 1:
            raise UserError(f"DROPOUT = {dropout}: choose a share in [0, 1), such as 0.2")
        self.model_args = {"arch": arch, "width": width, "dropout": dropout, "residual": residual}
        self.residual, plain = residual, arch == "unet"
        self.net = UNet(width, dropout) if plain else EncoderUNet(arch, dropout)
        self.multiple = 2**LEVELS if plain else 32
        # the network's unit: [-1, 1], or what a pretrained encoder is used to
        mean, std = ((0.5,) * 3, (0.5,) * 3) if plain else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if residual:  # no correction at the start: the first step already has the input's PSNR
            nn.init.zeros_(self.net.head.weight)
            nn.init.zeros_(self.net.head.bias)

    def forward(self, images, every_stage=False):
        """Restore a batch; reflected at the border up to the next multiple of 16 or 32 and cut back.

        Args:
            images: (B, 3, H, W) RGB in [0, 1], any size.
            every_stage: as a list, for callers of networks with several stages; this one has one.
        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """
        height, width = images.shape[-2:]
        padded = to_multiple(images, self.multiple)
        value = torch.tanh(self.net((padded - self.mean) / self.std)[..., :height, :width].float())
        restored = clamp_with_return(images.float() + value) if self.residual else (value + 1) / 2
        return [restored] if every_stage else restored


def _smp():
    """The optional package, or one line that says how to get it."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise UserError("ARCH: encoders need the package segmentation-models-pytorch: pip install "
                        "segmentation-models-pytorch, or choose ARCH = 'unet'") from None
    return smp


def require_arch(arch, others=()):
    """UserError unless `arch` is "unet" or an encoder of segmentation_models_pytorch; others: what else may be chosen.
    """
    if arch != "unet" and arch not in _smp().encoders.encoders:
        raise UserError(f"ARCH = {arch!r}: choose one of {', '.join(['unet', *others])}, or an encoder of "
                        "segmentation_models_pytorch such as resnet34, resnet50 or efficientnet-b0")


def new_unet(arch="resnet34", width=64, dropout=0.0, residual=True, encoder_weights=""):
    """A U-Net that is still to be trained.

    Args:
        arch, width, dropout, residual: see `UNetDerainer`.
        encoder_weights: for encoders, "imagenet" (downloaded from the Hugging Face hub once), "" for random ones, or a
            local file with torchvision's state dict of the same network.
    Raises:
        UserError: unknown architecture, weights that cannot be reached or do not fit; names the constant.
    """
    require_arch(arch)
    model = UNetDerainer(arch, width, dropout, residual)
    if arch == "unet" or not encoder_weights:
        return model
    encoder = model.net.net.encoder
    if encoder_weights == "imagenet":
        try:
            state = _smp().encoders.get_encoder(arch, weights="imagenet").state_dict()
        except (OSError, RuntimeError, KeyError) as error:  # KeyError: there are none of this name for the encoder
            raise UserError(
                f"ENCODER_WEIGHTS = 'imagenet': cannot download the weights of {arch} ({_first_line(error)}). Set "
                f"ENCODER_WEIGHTS to a local file with torchvision's weights of {arch}, or to \"\" for random ones."
            ) from error
    else:
        checkpoint.require_weights(encoder_weights, "ENCODER_WEIGHTS")
        state = checkpoint.load_state(encoder_weights)
        state = {name: value for name, value in state.items() if not name.startswith(("fc.", "classifier."))}
        # files from before BatchNorm counted its batches
        state |= {name: value for name, value in encoder.state_dict().items()
                  if name.endswith("num_batches_tracked") and name not in state}
    checkpoint.load_into(encoder, state, f"ENCODER_WEIGHTS = '{encoder_weights}'")
    return model


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
