"""sources.py - what a script trains on, as its flags say: the embedded world's own data, or a user's files."""
from pathlib import Path

from data import toy
from data.base import is_world_base
from data.preferences import read_preferences
from data.rewards import rewards_of
from runs.files import UserError
from runs.randomness import generator_for


def check_knows_world(flags):
    """Raises UserError where --init names a base that would be trained on the embedded world and was not made for it.
    Whoever gives it the world's tokenizer means that."""
    if flags.data is not None or not (Path(flags.init or "") / "config.json").exists() or is_world_base(flags.init):
        return
    if flags.tokenizer != "toy":
        raise UserError(f"--init needs --data: {flags.init} does not know the embedded world; --data FILE --eval_data "
                        f"FILE trains it on files (on the world nevertheless: --tokenizer toy)")
    print(f"data: the embedded world, which {flags.init} was not made for")


def check_preferences(flags):
    """Raises UserError for flags about preference rows that do not fit together."""
    check_knows_world(flags)
    if flags.responses > toy.N_RESPONSES:
        raise UserError(f"--responses {flags.responses}: the embedded world has {toy.N_RESPONSES} to a prompt")
    if flags.data is not None and flags.init is None:
        raise UserError("--data needs --init: the embedded world's base model knows no other text")
    if flags.data is not None and flags.eval and flags.eval_data is None:
        raise UserError("--data needs --eval_data (or --no-eval)")


def preference_rows(flags, eval_rows=0):
    """The data rows (data.files.Row), the held-out ones, and their dimensions. On the embedded world `eval_rows` are
    held out; of files all those of --eval_data, none without --eval."""
    if flags.data is None:
        dims = toy.choose_dims(flags.dims, flags.pref_dim)
        draw = lambda split, n, g: toy.sample_pairs(split, dims, n, flags.responses, g)
        held_out = draw("new_verbs", eval_rows, generator_for(0, "eval pairs")) if eval_rows else []
        return draw("train", flags.rows, generator_for(flags.seed, "pairs")), held_out, dims
    rows, dims, dropped = read_preferences(flags.data, flags.dims, flags.pref_dim, flags.seed, flags.fields)
    # read now, so that a bad file is not found after the training
    held_out = read_preferences(flags.eval_data, dims, fields=flags.fields)[0] if flags.eval else []
    print(f"{' '.join(flags.data)}: {len(rows)} rows with a label for {', '.join(dims)}"
          + f"; {dropped} without any are left out" * (dropped > 0))
    return rows, held_out, dims


def check_rewards(flags, name):
    """Raises UserError for flags about rewards that do not fit together. name: the flag of the files: prompts, data."""
    files = getattr(flags, name)
    if files is not None and (flags.init is None or flags.rewards is None):
        raise UserError(f"--{name} needs --init and --rewards: "
                        f"the embedded world's model and scores know no other text")
    if files is None and flags.init is not None and not is_world_base(flags.init):
        raise UserError(f"--init needs --{name} (and --rewards): this model knows nothing of the embedded world")
    if flags.rewards is None and len(flags.dims or [0] * flags.pref_dim) < 2:
        raise UserError("a front needs at least 2 dimensions: --pref_dim 2, or two names after --dims")


def rewards_in(flags, files, scale, policy, device):
    """The rewards of --rewards, or the embedded world's scores of --dims; two at least."""
    names = flags.rewards or toy.choose_dims(flags.dims, flags.pref_dim)
    rewards = rewards_of(names, scale, files is None, policy, device)
    if len(rewards.dims) < 2:
        raise UserError("a front needs at least 2 dimensions: name two rewards after --rewards")
    return rewards


def room_for_prompts(flags, config):
    """Tokens of prompt and response together, of which --max_new_tokens are the response's. Raises UserError where
    nothing is left for a prompt."""
    length = min(flags.max_length, config.context_length)
    if flags.max_new_tokens >= length:
        raise UserError(f"--max_new_tokens {flags.max_new_tokens} leave no room for a prompt in {length} tokens")
    return length
