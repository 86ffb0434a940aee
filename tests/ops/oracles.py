"""The recurrences token by token, straight from the formulas. They share no code with `statecache.ops`."""

import torch
from torch import Tensor


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """Outputs (B, T, C) of x (B, T, C), weight (C, W) or (B, T, C, W), past (B, C, W-1)."""
    width = weight.shape[-1]
    zeros = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    inputs = [zeros if past is None else past[..., w] for w in range(width - 1)] + list(x.unbind(1))
    outputs = []
    for t in range(x.shape[1]):
        own = weight if weight.dim() == 2 else weight[:, t]
        y = sum(inputs[t + w] * own[..., w] for w in range(width))
        y = y if bias is None else y + bias
        outputs.append(y * torch.sigmoid(y) if silu else y)
    return torch.stack(outputs, 1) if outputs else x.clone()


def conv_by_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    silu: bool,
    heads: tuple[Tensor, Tensor | None],
) -> Tensor:
    """The same with a second convolution of its outputs by head, weight (C, P, V), bias (C); past (B, C, W+V-2)."""
    second, offset = heads
    channels, size, width = second.shape
    zeros = torch.zeros(x.shape[0], channels, weight.shape[1] + width - 2, dtype=x.dtype)
    seen = torch.cat([zeros if past is None else past, x.transpose(1, 2)], 2).transpose(1, 2)
    first = conv(seen, weight, bias, None, False)[:, weight.shape[1] - 1 :]  # those whose inputs are all there
    outputs = []
    for t in range(x.shape[1]):
        of_head = [first[:, t : t + width, c // size * size :][..., :size] for c in range(channels)]  # (B, V, P) each
        y = torch.stack([torch.einsum("bvp,pv->b", of_head[c], second[c]) for c in range(channels)], 1)
        y = y if offset is None else y + offset
        outputs.append(y * torch.sigmoid(y) if silu else y)
    return torch.stack(outputs, 1) if outputs else x.clone()


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, G, P) and the T+1 states (B, G, P, N)."""
    states, outputs = [state], []
    for t in range(x.shape[1]):
        decay = torch.exp(torch.einsum("bgp,gpn->bgpn", dt[:, t], A))
        state = decay * state + torch.einsum("bgp,bgn->bgpn", dt[:, t] * x[:, t], B[:, t])
        states.append(state)
        outputs.append(torch.einsum("bgpn,bgn->bgp", state, C[:, t]))
    return torch.stack(outputs, 1) if outputs else x.clone(), states


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, H, P) and the T+1 states (B, H, P, N)."""
    group = [h // (x.shape[2] // B.shape[2]) for h in range(x.shape[2])]
    states, outputs = [state], []
    for t in range(x.shape[1]):
        new = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t, group])
        state = torch.exp(dt[:, t] * A)[:, :, None, None] * state + new
        states.append(state)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t, group]))
    return torch.stack(outputs, 1) if outputs else x.clone(), states


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, H, V) and the T+1 states (B, H, K, V). g: a decay a head (B, T, H), or a channel (B, T, H, K)."""
    head = [h // (v.shape[2] // k.shape[2]) for h in range(v.shape[2])]
    q, k = ((a / (a.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt())[:, :, head] for a in (q, k))
    states, outputs = [state], []
    for t in range(v.shape[1]):
        state = torch.exp(g[:, t]).reshape(len(g), g.shape[2], -1, 1) * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bh,bhv->bhkv", k[:, t], beta[:, t], error)
        states.append(state)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1) if outputs else v.clone(), states


def lightning(
    q: Tensor, k: Tensor, v: Tensor, alive: Tensor, slope: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, H, D) and the T+1 states (B, H, D, D); a token that is not alive changes nothing."""
    states, outputs = [state], []
    for t in range(v.shape[1]):
        gate = alive.reshape(*v.shape[:2])[:, t, None, None, None].to(v.dtype)
        moved = torch.exp(-slope)[:, None, None] * state + torch.einsum("bhd,bhe->bhde", v[:, t], k[:, t])
        state = gate * moved + (1 - gate) * state
        states.append(state)
        outputs.append(torch.einsum("bhde,bhe->bhd", state, q[:, t]))
    return torch.stack(outputs, 1) if outputs else v.clone(), states


def rg_lru(x: Tensor, g: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, W) and the T+1 states (B, W)."""
    states, outputs = [state], []
    for t in range(x.shape[1]):
        decay = torch.exp(g[:, t])
        state = decay * state + torch.sqrt(1 - decay**2) * x[:, t]
        states.append(state)
        outputs.append(c[:, t] * state)
    return torch.stack(outputs, 1) if outputs else x.clone(), states


def delay(x: Tensor, alive: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, *D) and the T+1 states (B, *D): the x of the last token that was alive."""
    states = [state]
    for t in range(x.shape[1]):
        rows = [x[b, t] if alive.reshape(*x.shape[:2])[b, t] else states[-1][b] for b in range(len(x))]
        states.append(torch.stack(rows))
    return torch.stack(states[:-1], 1) if x.shape[1] else x.clone(), states
