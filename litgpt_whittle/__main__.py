"""Console script `litgpt-whittle`, for environments where PyTorch does not load the plugin into `litgpt`.

PyTorch loads no plugins if `TORCH_DEVICE_BACKEND_AUTOLOAD=0` is set.
"""

from litgpt_whittle.plugin import commands, show_user_errors_in_one_line


def main() -> None:
    """Run `litgpt-whittle COMMAND …` with litgpt's own parser."""
    import torch
    from litgpt.utils import CLI

    torch.set_float32_matmul_precision("high")  # as litgpt's command line does
    ours = commands()
    show_user_errors_in_one_line(set(ours))
    CLI(ours)


if __name__ == "__main__":
    main()
