"""Snapshots in host memory for a small language model under DeepSpeed ZeRO-1. No graph.

    python -m gemini_gnn.run --run-dir /tmp/lm examples/transformer_zero1.py --steps 100
    deepspeed --num_gpus 2 --module gemini_gnn.run --run-dir /tmp/lm examples/transformer_zero1.py --steps 100

Kill it with SIGKILL wherever you like and type the same command: it goes on after its last step, with the same losses.
"""

import argparse

import deepspeed
import torch

import gemini_gnn.snapshot

VOCABULARY, CONTEXT = 64, 32


class LanguageModel(torch.nn.Module):
    """Two layers that learn to continue an arithmetic sequence."""

    def __init__(self, width=64):
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, width)
        self.positions = torch.nn.Parameter(torch.zeros(CONTEXT, width))
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        return self.head(self.layers(self.tokens(tokens) + self.positions, mask=mask, is_causal=True))


class Progress:
    """The state of the loop itself: JSON values, arrays and tensors."""

    def __init__(self):
        self.step, self.losses = 0, []

    def state_dict(self):
        return {"step": self.step, "losses": self.losses}

    def load_state_dict(self, state):
        self.step, self.losses = state["step"], state["losses"]


def batch(size=16):
    start, stride = torch.randint(VOCABULARY, (size, 1)), torch.randint(1, 5, (size, 1))
    sequence = (start + stride * torch.arange(CONTEXT + 1)) % VOCABULARY
    return sequence[:, :-1], sequence[:, 1:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--losses", help="write the losses to this file at the end")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    options = parser.parse_args()
    deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl", verbose=False)
    rank = torch.distributed.get_rank()

    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20)),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        },
    )
    progress = Progress()
    torch.manual_seed(1 + rank)  # from here on every rank draws its own data
    snapshots = gemini_gnn.snapshot.attach(engine, progress)  # <- the one line
    if rank == 0:
        print(f"going on after step {progress.step}" if snapshots.restored else "a fresh start", flush=True)

    while progress.step < options.steps:
        tokens, targets = (t.to(engine.device) for t in batch())
        loss = torch.nn.functional.cross_entropy(engine(tokens).flatten(0, 1), targets.flatten())
        engine.backward(loss)
        progress.step += 1  # before engine.step(): the snapshot is taken when it returns
        progress.losses.append(loss.item())
        engine.step()
        if rank == 0 and progress.step % 20 == 0:
            print(f"step {progress.step}: loss {loss.item():.4f}", flush=True)

    snapshots.close()
    if rank == 0 and options.losses:
        with open(options.losses, "w") as file:
            file.writelines(f"{loss!r}\n" for loss in progress.losses)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
