"""Adam and AdamW over many parameter shards in one launch, with what else reads or writes them.

Unscaling (`grad_scale`) and clipping (`clip`) of the gradients, decoupled or L2 weight decay, the
moments, the update, and where asked the new parameter cast into a further tensor: the input of
its next all-gather. A nonzero `found_inf` leaves everything as it is. All of these are read on the
device, so that the host never waits.

The arguments and their meaning are those of `torch._fused_adamw_`: steps have been advanced before,
and gradients that were unscaled are written back. Rounding differs from it by a few units in the
last place: multiplication by 1 / grad_scale for a division (exact for powers of two, which is what
GradScaler uses); `beta1 * m + (1 - beta1) * g` for `lerp`; and bias corrections of steps that live
on the device, which are -expm1(step * log(beta)) in float32 here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .ahead import Specialisation
from .emit import Kernel, fill
from .launch import block_size, launch
from .table import make_table

NAME = "adamw"
LARGEST = 1024 * ((1 << 31) - 1)  # elements of one tensor: blocks are counted in int32

_TRITON = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float64: "tl.float64",
}

# The host knows steps that live there, and gives `size` = lr / (1 - beta1^step) and `root` =
# sqrt(1 - beta2^step); the kernel computes both from steps that live on the device. `rest` is
# 1 - beta, rounded once, and `decay` the weight decay, times lr if decoupled and lr is a number.
_TEMPLATE = """
$series
@triton.jit
def adamw(
    $pointers
    $scalars
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    $stop
    row = tl.load(blocks_ptr + 2 * tl.program_id(0))
    first = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    entry = rows_ptr + row.to(tl.int64) * $columns
    n = tl.load(entry) - first
    $addresses
    if ALIGNED:
        $aligned
    $once
    i = tl.arange(0, BLOCK)
    if n >= BLOCK:
        $load_block
        $work
        $store_block
    else:
        $load_tail
        $work
        $store_tail
"""

# 1 - exp(x) for x <= 0 has few digits left near 0: the series there.
_SERIES = """
@triton.jit
def one_minus_exp(x):
    s = 1.0 + x / 8.0
    for k in tl.static_range(7, 1, -1):
        s = 1.0 + x / k * s
    return tl.where(x > -0.5, -x * s, 1.0 - tl.exp(x))


"""


@dataclass(frozen=True)
class Form:
    """What one launch does: dtypes, and which of the optional parts there are.

    `copy` is the dtype of the cast parameters; `step` that of steps on the device (None: the host
    knows the step); `lr` says that the learning rate is a tensor on the device.
    """

    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    copy: torch.dtype | None = None
    step: torch.dtype | None = None
    lr: bool = False
    scale: bool = False
    clip: bool = False
    found_inf: bool = False
    write_grads: bool = False
    decay: bool = True
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False

    @property
    def compute(self) -> torch.dtype:
        """float32, or float64 for parameters in float64."""
        return torch.promote_types(self.param, torch.float32)

    @property
    def block(self) -> int:
        """Elements per program: 16 bytes a thread and load of 256 threads, or twice that of 128."""
        return 4096 // min(self.param.itemsize, 4)

    @property
    def warps(self) -> int:
        """256 threads for 16-bit parameters: of 128, Triton 3.6 leaves one a register short."""
        return 8 if self.param.itemsize < 4 else 4

    @property
    def columns(self) -> dict[str, torch.dtype]:
        """The tensors of a row of the table, in order."""
        found = {"p": self.param, "g": self.grad, "m": self.state, "v": self.state}
        if self.amsgrad:
            found["w"] = self.state
        if self.copy is not None:
            found["c"] = self.copy
        if self.step is not None:
            found["step"] = self.step
        return found

    @property
    def pointers(self) -> dict[str, bool]:
        """The further tensors, and whether there are any."""
        return {"lr": self.lr, "scale": self.scale, "clip": self.clip, "inf": self.found_inf}

    @property
    def scalars(self) -> tuple[str, ...]:
        """The numbers that the host gives."""
        moments = ("beta1", "rest1", "beta2", "rest2", "eps", "decay")
        if self.step is None:
            return ("size", "root", *moments)
        return ("log1", "log2", *moments) if self.lr else ("log1", "log2", "lr", *moments)


@cache
def emit(form: Form) -> Kernel:
    """The kernel of one form.

    Raises ValueError for a learning rate on the device with steps on the host.
    """
    if form.lr and form.step is None:
        raise ValueError("adamw: a learning rate on the device needs the steps there")
    compute = _TRITON[form.compute]
    tensors = [name for name in form.columns if name != "step"]
    written = ["p", *("g" for _ in [0] if form.write_grads), *tensors[2:]]
    found = [name for name, there in form.pointers.items() if there]

    def loads(mask: str) -> list[str]:
        read = [name for name in tensors if name != "c"]
        return [f"{x} = tl.load({x}_ptr + i{mask}).to({compute})" for x in read]

    def stores(mask: str) -> list[str]:
        named = {"c": "p", "g": "used"}
        return [
            f"tl.store({x}_ptr + i, {named.get(x, x)}.to({x}_ptr.dtype.element_ty){mask})"
            for x in written
        ]

    stop = ["if tl.load(inf_ptr) != 0.0:", "    return"] if form.found_inf else []
    series = [*_SERIES.strip("\n").splitlines(), "", ""]
    source = fill(
        _TEMPLATE,
        series=series if form.step is not None and form.compute is torch.float32 else [],
        pointers=[" ".join(f"{name}_ptr," for name in ("rows", "blocks", *found))],
        scalars=[" ".join(f"{name}: {compute}," for name in form.scalars)],
        stop=stop,
        columns=str(1 + len(form.columns)),
        addresses=_addresses(form, first="first"),
        aligned=[f"{x}_ptr = tl.multiple_of({x}_ptr, 16)" for x in tensors],
        once=_once(form, compute),
        load_block=loads(""),
        load_tail=loads(", mask=i < n, other=0.0"),
        work=_work(form),
        store_block=stores(""),
        store_tail=stores(", mask=i < n"),
    )
    return Kernel(NAME, source)


def _addresses(form: Form, first: str) -> list[str]:
    lines = []
    for i, (name, dtype) in enumerate(form.columns.items(), 1):
        place = "" if name == "step" else f" + {first}"
        kind = f"tl.pointer_type({_TRITON[dtype]})"
        lines.append(f"{name}_ptr = tl.load(entry + {i}).to({kind}){place}")
    return lines


def _once(form: Form, compute: str) -> list[str]:
    """What a program computes before its elements."""
    lines = []
    if form.lr:
        lines.append(f"lr = tl.load(lr_ptr).to({compute})")
    if form.scale or form.clip:
        factors = []
        if form.scale:
            factors.append(f"1.0 / tl.load(scale_ptr).to({compute})")
        if form.clip:
            factors.append(f"tl.load(clip_ptr).to({compute})")
        lines.append(f"factor = {' * '.join(factors)}")
    if form.step is not None:
        lines.append(f"step = tl.load(step_ptr).to({compute})")
        corrections = (
            ("one_minus_exp(step * log1)", "one_minus_exp(step * log2)")
            if form.compute is torch.float32
            else ("(1.0 - tl.exp(step * log1))", "(1.0 - tl.exp(step * log2))")
        )
        lines += [f"size = lr / {corrections[0]}", f"root = tl.sqrt({corrections[1]})"]
    if form.lr and form.decay and form.decoupled:
        lines.append("decay = lr * decay")
    return lines


def _work(form: Form) -> list[str]:
    """From the loaded elements to the new ones."""
    lines = []
    if form.scale or form.clip:
        lines.append("g = g * factor")
    if form.write_grads:
        lines.append("used = g")
    if form.maximize:
        lines.append("g = -g")
    if form.decay:
        lines.append("p = p - decay * p" if form.decoupled else "g = g + decay * p")
    lines += ["m = beta1 * m + rest1 * g", "v = beta2 * v + rest2 * g * g"]
    if form.amsgrad:
        lines.append("w = tl.maximum(w, v, propagate_nan=tl.PropagateNan.ALL)")
    second = "w" if form.amsgrad else "v"
    return [*lines, f"p = p - size * m / (tl.sqrt({second}) / root + eps)"]


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    decoupled: bool = True,
    capturable: bool = False,
    write_grads: bool = True,
) -> None:
    """One step, in place: all tensors of a list on one device and of one dtype, laid out alike.

    The moments (and `max_exp_avg_sqs`, empty without `amsgrad`) share one dtype. `copies` get the
    new parameters in their dtype. `grad_scale`, `clip` and `found_inf` have one element, on the
    device. Steps on the device are read there; on a CPU if `capturable`, otherwise by the host,
    with one launch for each of their values. `write_grads` False spares the traffic of gradients
    that nobody reads again. A learning rate on the device needs steps there (ValueError).
    """
    if not params:
        return
    there = capturable or state_steps[0].device.type != "cpu"
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and not capturable:
        lr = lr.item()
    form = Form(
        param=params[0].dtype,
        grad=grads[0].dtype,
        state=exp_avgs[0].dtype,
        copy=copies[0].dtype if copies else None,
        step=state_steps[0].dtype if there else None,
        lr=isinstance(lr, Tensor),
        scale=grad_scale is not None,
        clip=clip is not None,
        found_inf=found_inf is not None,
        write_grads=write_grads and (grad_scale is not None or clip is not None),
        decay=weight_decay != 0,
        decoupled=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
    )
    kernel = emit(form)
    columns = [params, grads, exp_avgs, exp_avg_sqs]
    columns += [x for x, wanted in ((max_exp_avg_sqs, amsgrad), (copies, copies)) if wanted]
    pointers = [x for x in (lr, grad_scale, clip, found_inf) if isinstance(x, Tensor)]
    numbers = _numbers(float(beta1), float(beta2), float(eps))
    decay = weight_decay * lr if decoupled and not isinstance(lr, Tensor) else weight_decay
    numbers["decay"] = float(decay)
    if not isinstance(lr, Tensor):
        numbers["lr"] = float(lr)
    if there:
        _run(kernel, form, [*columns, state_steps], pointers, numbers)
    else:
        for step, chosen in _by_step(state_steps).items():
            numbers["size"] = numbers["lr"] / (1.0 - beta1**step)
            numbers["root"] = math.sqrt(1.0 - beta2**step)
            _run(kernel, form, [[c[k] for k in chosen] for c in columns], pointers, numbers)
    changed = [*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *copies]
    torch.autograd.graph.increment_version(changed + (list(grads) if form.write_grads else []))


def _numbers(beta1: float, beta2: float, eps: float) -> dict[str, float]:
    return {
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "eps": eps,
        "log1": math.log(beta1) if beta1 else -math.inf,
        "log2": math.log(beta2) if beta2 else -math.inf,
    }


def _by_step(steps: Sequence[Tensor]) -> dict[float, list[int]]:
    found: dict[float, list[int]] = defaultdict(list)
    for k, step in enumerate(steps):
        found[step.item()].append(k)
    return found


def _run(
    kernel: Kernel,
    form: Form,
    columns: Sequence[Sequence[Tensor]],
    pointers: Sequence[Tensor],
    numbers: dict[str, float],
) -> None:
    block = block_size(form.block)
    table = make_table(columns, block)
    launch(
        kernel,
        (table.programs,),
        table.rows,
        table.blocks,
        *pointers,
        *(numbers[name] for name in form.scalars),
        num_warps=form.warps,
        num_waves=4,
        ALIGNED=table.aligned,
        BLOCK=block,
    )


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    decoupled: bool = True,
    capturable: bool = False,
    write_grads: bool = True,
) -> None:
    """The same in torch; `capturable` changes nothing."""
    if found_inf is not None and found_inf.item():
        return
    for k, parameter in enumerate(params):
        compute = torch.promote_types(parameter.dtype, torch.float32)
        p, g, m, v = (x[k].to(compute) for x in (params, grads, exp_avgs, exp_avg_sqs))
        if grad_scale is not None:
            g = g / grad_scale
        if clip is not None:
            g = g * clip
        if write_grads and (grad_scale is not None or clip is not None):
            grads[k].copy_(g)
        g = -g if maximize else g
        p, g = (p * (1 - lr * weight_decay), g) if decoupled else (p, g + weight_decay * p)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        second = torch.maximum(max_exp_avg_sqs[k].to(compute), v) if amsgrad else v
        step = state_steps[k].item()
        denominator = second.sqrt() / math.sqrt(1 - beta2**step) + eps
        p = p - lr / (1 - beta1**step) * m / denominator
        outputs = [(params, p), (exp_avgs, m), (exp_avg_sqs, v)]
        outputs += [(max_exp_avg_sqs, second)] if amsgrad else []
        for into, value in [*outputs, *([(copies, p)] if copies else [])]:
            into[k].copy_(value)


def specialisations() -> list[Specialisation]:
    """Steps on the host, and on the device with all that mixed precision adds."""
    forms = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        forms.append(Form(param=dtype, grad=dtype, state=dtype))
        forms.append(Form(param=dtype, grad=dtype, state=dtype, step=torch.float32, amsgrad=True))
    master = Form(copy=torch.bfloat16)
    scaled = Form(step=torch.float32, scale=True, found_inf=True, write_grads=True)
    clipped = Form(grad=torch.bfloat16, copy=torch.bfloat16, step=torch.float32, lr=True, clip=True)
    return [_form(form) for form in (*forms, master, scaled, clipped)]


def _form(form: Form) -> Specialisation:
    compute = {torch.float32: "fp32", torch.float64: "fp64"}[form.compute]
    pointers = [f"{name}_ptr" for name, there in form.pointers.items() if there]
    return Specialisation(
        emit(form),
        {
            "rows_ptr": "*i64",
            "blocks_ptr": "*i32",
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(form.scalars, compute),
        },
        {"ALIGNED": True, "BLOCK": form.block},
        ("rows_ptr", "blocks_ptr"),
        form.warps,
        num_waves=4,
    )
