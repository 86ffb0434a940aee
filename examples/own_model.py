"""A model of one's own in plain torch, with a convolution, a recurrence and attention: its states count and go back."""

import torch
from torch import nn
from torch.nn import functional as F

from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States

D, H, P, K, WORDS = 32, 4, 8, 4, 50  # width; heads and their size; width of the convolution; words
conv, memory = StateSpec("conv", "conv", (D,), K - 1), StateSpec("memory", "recurrent", (H, P, P), 1, leased=True)
pair = StateSpec("key", "attention", (H, P)), StateSpec("value", "attention", (H, P))
spec = ModelSpec((LayerSpec(0, "linear", (conv, memory)), LayerSpec(1, "attention", pair)), "my model")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.conv, self.mix, self.look = nn.Parameter(torch.randn(D, 1, K)), nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)

    def forward(self, ids: torch.Tensor, states: States) -> torch.Tensor:
        with states.one_pass(ids.shape[1]) as now:  # B rows of T tokens; closed at the end of the block
            x = self.embed(ids)
            near = F.conv1d(now.window("0.conv", x).mT, self.conv, groups=D).mT  # (B, K - 1 + T, D) in, (B, T, D) out
            q, k, v = self.mix(F.silu(near)).unflatten(-1, (3, H, P)).unbind(2)  # (B, T, H, P) each
            state, read = now.read("0.memory"), []
            for t in range(ids.shape[1]):
                state = 0.9 * state + k[:, t, :, :, None] * v[:, t, :, None]
                read.append((q[:, t, :, None] @ state).flatten(1))
            now.write("0.memory", state)
            x = x + torch.stack(read, 1)
            q, k, v = self.look(x).unflatten(-1, (3, H, P)).unbind(2)
            k, v, seen = now.attend("1.key", k), now.attend("1.value", v), now.visible("1.key")
            y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=seen)
            return self.head(x + y.transpose(1, 2).flatten(2))


torch.manual_seed(0)
torch.set_grad_enabled(False)
model, ids = Model().double(), torch.randint(WORDS, (2, 20))
whole = model(ids, States(spec, rows=2, dtype=torch.float64, device="cpu"))
states = States(spec, slack=4, rows=2, dtype=torch.float64, device="cpu")
parts = [model(part, states) for part in ids.split([7, 1, 4, 1, 1, 1, 5], 1)]
print(f"in seven passes: {(torch.cat(parts, 1) - whole).abs().max():.0e} from one; {states.lengths.tolist()} tokens")
states.reset()
model(ids[:, :10], states)
for _ in range(3):
    model(torch.randint(WORDS, (2, 1)), states)  # a continuation to try
states.rollback(3)
again = model(ids[:, 10:], states)
print(f"after a rollback of 3: {(again - whole[:, 10:]).abs().max():.0e} from one")
torch.testing.assert_close(torch.cat(parts, 1), whole)
torch.testing.assert_close(again, whole[:, 10:])
