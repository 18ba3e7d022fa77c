"""What the programs of ``wandb_runs.py`` and the tests that read what they leave have to agree on."""

SEEN, SAID = "seen.pickle", "said.txt"
HUB_TOKEN, PASSWORD, OTHER_KEY = "hf_PlantedInTheArguments00000", "planted-password-1", "planted-key-in-config-2"
ENVIRONMENT_TOKEN = "planted-environment-3"
SECRETS = (HUB_TOKEN, PASSWORD, OTHER_KEY, ENVIRONMENT_TOKEN)
STEPS, WAITS_AT, WAITS, GO = 12, 6, "waits", "go"
CHECKPOINT, CRASHED, END, EVERY = 200, 212, 220, 4
STAND_IN = "STAND_IN"  # environment variable: where the stand-in keeps what reached it
