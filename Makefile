# make demo   set up, train on the bundled speech, say how to open the dashboard
# make test   set up, pass the tests
# make lint   ruff, mypy, and who imports whom
# make bench  measurements
# make pictures  photographs of the dashboards, from the demonstration's run
# make mistakes  what is found in planted mistakes and healthy trainings
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
DEMO = runs/demo

.PHONY: demo test lint bench mistakes pictures clean

demo: $(VENV)/.installed
	$(BIN)/python -m trainer.demo prepare $(DEMO)
	rm -rf $(DEMO)/output $(DEMO)/logs
	$(BIN)/python trainer/train_v2_ddp.py \
		--model_path $(DEMO)/model --audio_tokenizer_path $(DEMO)/audio_tokenizer \
		--train_data_file $(DEMO)/train.json --eval_data_file $(DEMO)/eval.json \
		--output_dir $(DEMO)/output --logging_dir $(DEMO)/logs \
		--max_steps 150 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
		--learning_rate 2e-3 --warmup_steps 20 --logging_steps 5 --eval_steps 50 --save_steps 150 \
		--enable_strategic_logging --strategic_logging_steps 10 --zero_shot_clips 6 \
		--speaker_encoder resemblyzer --transcriber pocketsphinx --opinion_scorer dnsmos

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks

mistakes: $(VENV)/.installed-dev
	PYTHONPATH=.:tests $(BIN)/python -m mistakes

pictures: $(VENV)/.installed-dev | $(DEMO)/logs
	PYTHONPATH=.:tests $(BIN)/python -m pictures $(DEMO) docs/pictures

$(DEMO)/logs:
	$(MAKE) demo

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[listeners,report]'
	$(PIP_INSTALL) --no-deps resemblyzer
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps resemblyzer
	touch $@ $(VENV)/.installed
