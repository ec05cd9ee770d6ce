"""``python -m nemo_minitron.runtime.cpu``: the patches as the table of docs/runtime.md."""

from nemo_minitron.runtime.cpu import markdown
from nemo_minitron.runtime.cpu.quiet import quiet

quiet()
print(markdown())
