"""Multiple-choice and log-likelihood tasks of lm-eval, scored in this process on a model or a super-network."""

from litgpt_whittle.tasks.args import SearchTaskArgs, TaskArgs
from litgpt_whittle.tasks.batches import TaskBatch
from litgpt_whittle.tasks.task_set import Document, Task, TaskResult, TaskSet

__all__ = ["Document", "SearchTaskArgs", "Task", "TaskArgs", "TaskBatch", "TaskResult", "TaskSet"]
