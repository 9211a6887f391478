"""What can be trained: a class in a module of this package registers itself under the name that `config.task` says."""

from m2m_jax.core.registry import Registry

TASKS: Registry[type] = Registry("task", package="m2m_jax.tasks")
