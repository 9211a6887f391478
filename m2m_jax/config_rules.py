"""Which values a configuration may have."""

from __future__ import annotations

from m2m_jax.config_fields import Group, chosen, fields_of, given_options, groups_in


def validate(group: Group) -> None:
    """Raise UserError for the first field of a config, or of a group of it, whose value makes no run.

    First come the fields, by their limits and choices; then what the things say that they choose; then each group's
    own `check`. A thing, a registered class for example, may have

        @classmethod
        def check_config(cls, group) -> None: ...  # raises UserError

    and is given the group that names it: the whole config for `task`, `config.data` for `data.name`.
    """
    fields = [(part, name, one) for part in groups_in(group) for name, one in fields_of(type(part)).items()]
    for part, name, one in fields:
        if not one.is_group:
            one.check(getattr(part, name), part.name_of(name))
    for part, name, one in fields:
        if one.about.options_of:
            given_options(part, name)
        check = getattr(chosen(part, name), "check_config", None) if one.about.choices else None
        if check:
            check(part)
    for part in groups_in(group):
        part.check()
