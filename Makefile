# PYTHON: any version that TensorFlow supports. The environment is made once and again when requirements change.
PYTHON ?= python3
VENV ?= .venv
RUN = TF_CPP_MIN_LOG_LEVEL=3 $(VENV)/bin/python

.PHONY: demo test bench

$(VENV)/made: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@

# Trains a patch-backdoored and a filter-backdoored model of the built-in dataset if absent, and scans both.
demo: $(VENV)/made
	$(RUN) -m models.train --dataset signs --name patch1 --attack patch:size=5,position=bottom-right,colour=white,target=7
	$(RUN) -m models.train --dataset signs --name filter1 --attack filter:name=sepia,target=3
	$(RUN) pnnir.py --dataset signs --models patch1 filter1
	$(RUN) potential_triggers_reconstruction.py --dataset signs --models patch1
	$(RUN) potential_triggers_reconstruction_feature_space.py --dataset signs --models filter1
	$(RUN) critical_features_preservation.py --dataset signs --models patch1
	$(RUN) backdoor_detection.py --dataset signs --models patch1
	$(RUN) backdoor_detection_feature_space.py --dataset signs --models filter1
	@echo "pictures: results/signs/patch1/*.png and results/signs/filter1/*.png"

test: $(VENV)/made
	$(RUN) -m pytest -q -n 2

# Times the stages against the published structure and against bare passes; writes benchmarks/results.json.
bench: $(VENV)/made
	$(RUN) -m benchmarks.speed
