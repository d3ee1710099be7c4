"""A small chapter, to try on it what is done with chapters."""

FRONT_MATTER = """---
jupytext:
  formats: ipynb,md:myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""

TOY = (
    FRONT_MATTER
    + """# A toy

```{code-cell} ipython3
import os, sys
from lora_course import sparse
print(sparse.ANSWER, file=sys.stderr)
sparse.ANSWER
```

```{code-cell} ipython3
:tags: [gpu]

raise RuntimeError("there is no GPU here")
```

```{code-cell} ipython3
open(os.environ["LORA_COURSE_CLAIMS"] + "/9_9_toy.json", "w").write('{"claims": []}')
```
"""
)
