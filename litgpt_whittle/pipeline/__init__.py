"""`litgpt whittle`: the other commands as the stages of one."""
