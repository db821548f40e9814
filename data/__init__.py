"""data/ - everything that is text before it is tensors: what is trained on, and what scores it.

files.py reads the files that users give, layouts.py knows what their fields mean, and preferences.py, prompts.py,
offline.py say what their rows are good for; check.py tells a user what was understood;
sources.py chooses between them and the embedded world, as a script's flags say; batches.py cuts rows into batches.
toy.py is the embedded world, base.py finds or trains its base model. chat.py writes turns as texts by chat templates,
which render.py runs in a process of its own. tokenizers.py (with make_bpe.py), trees.py and batches.py turn rows into
batches of tokens; reference.py has log π_ref of them; tokenizer_json.py writes a tokenizer for others. rewards.py,
text_rewards.py and own_rewards.py, which runs files of the user's, score responses.

May live here: layouts of files, chat templates, tokenizers, packing of batches, the embedded world, rewards of texts.
May not: a model's mathematics, a loss, an evaluation, anything that trains an adapter. The files import ops, runs and
objectives, and model and svd_lora only to load a base or a trained reward model.
"""
