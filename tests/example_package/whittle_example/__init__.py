"""Parts for litgpt_whittle that live in a package of their own; `tutorials/extending.md` explains them."""
