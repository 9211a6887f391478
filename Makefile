# Two commands matter: `make demo` and `make test`. Each makes its own virtual environment, and costs nothing
# the second time. `make help` lists the rest.
#   PYTHON=python3.12        the interpreter for both environments (3.11 to 3.13)
#   PARITY=1                 with test: install PyTorch too and run the parity tests (Python 3.11)
#   PYTEST_ARGS="-n 8 -x"    with test and test-full: in place of "-n 2 --dist loadfile --no-loadscope-reorder"

SHELL := /bin/bash
PYTHON ?= python3
PARITY ?=
# Files in the order of tests/conftest.py, and not those with the most tests first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Environments are always entered by relative path and `python -m`, so that a folder with spaces in its path
# works. Bytecode is written: `import jax` takes 1 s with it, 4 s without.
export PYTHONDONTWRITEBYTECODE :=
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
RUN := .venv/bin/python -m
TEST := .venv-test/bin/python -m

# One stamp file for each Python version and set of requirements: newer than the requirements means installed.
DEMO_ENV := .venv/.installed-$(VERSION)
PLAN_ENV := .venv-plan/.installed-$(VERSION)
TEST_ENV := .venv-test/.installed-$(VERSION)$(if $(PARITY),-parity)

DEMO_CONFIG := configs/emoji.py:demo
DEMO_RUN := runs/demo
DEMO_SETS := $(DEMO_RUN)/test_sets
DEMO_SAMPLES := $(DEMO_RUN)/test_samples

ROAD := runs/road
ROAD_ENV := .venv/.installed-road-$(VERSION)
ROAD_RUNS := self_on_mis dino_on_mis self_on_emoji dino_on_emoji
ON_MIS := --config.data.name=mis --config.data.path=$(ROAD)/data
COMMA := ,
SPACE := $(subst ,, )
ROAD_EVALUATE := $(RUN) m2m_jax.evaluate --config configs/emoji.py:road --split=test --batches=23 \
  --checkpoints=$(subst $(SPACE),$(COMMA),$(addprefix $(ROAD)/,$(ROAD_RUNS)))

# `make pretrain`: minutes of training in all, and each stage's share. VAE=pretrained/sets_vae leaves out the first stage.
MINUTES ?= 600
PRETRAIN := runs/pretrain
PRETRAIN_ENV := .venv/.installed-pretrain-$(VERSION)
VAE ?= $(PRETRAIN)/models/sets_vae
UNET := $(PRETRAIN)/models/sets_unet
PRETRAIN_ARGS ?=
ON_SETS = --config.autoencoder.path=$(VAE)
minutes = --config.train.minutes=$$(awk 'BEGIN { print $(MINUTES) * $(1) }') $(PRETRAIN_ARGS)

# Emoji families as npm packages, which `npm pack` checks against the registry's sums; licences in each.
NPM_EMOJI := noto@1.2.9 noto-v1@1.2.5 twemoji@1.2.5 openmoji@1.2.29 emojione@1.2.3 emojione-v1@1.2.3 fxemoji@1.2.2 \
  fluent-emoji@1.2.7 fluent-emoji-flat@1.2.6 streamline-emojis@1.2.4

# Thirty decks of playing cards, as a Debian package: apt-get checks its sum; on Debian and its children alone.
DEBIAN_CARDS := gnome-cards-data=1:3.22.23-1

# For the loop of changing and trying: less than a minute on 2 quiet cores.
FAST := attention configuration contact_sheet disk guidance images keys layers metrics schedule shape_checks

# The sampler binary: the part of m2m_jax that a bundle needs, as one file.
SAMPLER ?= dist/m2m-sample.pyz
SAMPLER_PYTHON ?= $(PYTHON)
BUILD ?= build
SAMPLER_FILES := $(addprefix m2m_jax/,__init__.py $(addsuffix .py,$(addprefix core/,disk errors fields gathering image_folder images options paths printing \
  registry runtime) $(addprefix view/,contact_sheet html_page) $(addprefix sampling/,bundle bundle_program job program_check \
  run_job set_sampler)))

.PHONY: help demo npm-emoji debian-cards hands pretrain road test test-fast test-full fuzz soak lint format parity plan bench bench-context bench-overhead bench-reading sampler clean

help:
	@echo 'make demo       prepare the emoji sets, train the demo model, sample; prints where the contact sheet is'
	@echo 'make npm-emoji  fetch ten emoji families as npm packages (29 MB, needs npm) into data/npm'
	@echo 'make hands      the emoji sets of many hands, 64 px and 32 px, of those families or, without them, of three'
	@echo 'make debian-cards  fetch thirty decks of playing cards as a Debian package (11 MB) into data/debian'
	@echo 'make pretrain   first stage, single-image model, M2M-Self and M2M-DINO on those sets, in MINUTES=600; resumes'
	@echo 'make road       the road of the paper, small: text-to-image, synthetic sets, M2M on them, tried on real ones; hours'
	@echo 'make test       lint, then every test but the slow ones'
	@echo 'make test-fast  what is tested in a minute: layers, configuration, images, schedules, guidance, attention, shapes'
	@echo 'make test-full  lint, then every test'
	@echo 'make fuzz       27,000 damaged captions, images, records, bundles, models and configs: each handled or refused; docs/fuzzing.md'
	@echo 'make parity     only the comparisons with PyTorch and diffusers (Python 3.11)'
	@echo 'make bench      the U-Net here and in diffusers, side by side: seconds a forward pass and a training step (likewise)'
	@echo 'make plan       what training at full size needs and can reach on TPUs, compiled without one: docs/planning.md'
	@echo 'make bench-context  seconds an image with 0 to 24 context images, cached and uncached'
	@echo 'make bench-overhead  what checkpoints and guards cost, as shares of training time'
	@echo 'make bench-reading  how fast image sets from captions are read, against how fast the demo uses them up'
	@echo 'make soak       kill a run 20 times and a build of image sets 10 times; each must end bit for bit as one that nobody killed'
	@echo 'make sampler    dist/m2m-sample.pyz, which samples from an exported bundle without model code'
	@echo 'make lint       ruff check, ruff format --check and mypy, which checks the types of the package'
	@echo 'make format     let ruff mend what it can'
	@echo 'make clean      remove the environments, the demo run and the caches (data/ and other runs stay)'

demo: $(DEMO_ENV)
	$(RUN) m2m_jax.data.prepare --size=32 --directory=data
	$(RUN) m2m_jax.train --config $(DEMO_CONFIG) --workdir $(DEMO_RUN)
	test -d $(DEMO_SETS) || $(RUN) m2m_jax.data.export --config $(DEMO_CONFIG) --split=test --num_sets=12 --output=$(DEMO_SETS)
	$(RUN) m2m_jax.sample --checkpoint=$(DEMO_RUN) --sets=$(DEMO_SETS) --num_context=3 --num_images=4 --output=$(DEMO_SAMPLES)
	@echo
	@echo 'Contact sheet (context images framed in blue, generated ones beside them):'
	@echo "$(CURDIR)/$(DEMO_SAMPLES)/contact_sheet.png"

npm-emoji:
	mkdir -p data/npm
	cd data/npm && for package in $(NPM_EMOJI); do test -f iconify-json-$${package/@/-}.tgz || npm pack --silent @iconify-json/$$package || exit; done

debian-cards:
	mkdir -p data/debian
	cd data/debian && test -d usr || { apt-get download $(DEBIAN_CARDS) && dpkg-deb -x gnome-cards-data_*.deb .; }

hands: $(DEMO_ENV)
	$(RUN) m2m_jax.data.prepare --name=emoji_hands --size=64 --directory=data
	$(RUN) m2m_jax.data.prepare --name=emoji_hands --size=32 --directory=data

# Each line is skipped, or costs seconds, where it is done. With an environment of one's own, PRETRAIN_ENV= RUN='python3 -m'.
pretrain: $(PRETRAIN_ENV) npm-emoji
	$(RUN) m2m_jax.data.prepare --name=emoji_hands --size=64 --directory=data
	test -d data/vit_s14 || $(RUN) m2m_jax.data.prepare_vit --output=data/vit_s14
	test -d $(VAE) || test -d data/stlpips_vgg || $(RUN) m2m_jax.data.prepare_stlpips --output=data/stlpips_vgg
	test -d $(VAE) || $(RUN) m2m_jax.train --config configs/sets_vae.py --workdir $(PRETRAIN)/sets_vae $(call minutes,0.3)
	test -d $(VAE) || $(RUN) m2m_jax.to_diffusers --checkpoint $(PRETRAIN)/sets_vae --output $(VAE)
	$(RUN) m2m_jax.train --config configs/sets_base.py --workdir $(PRETRAIN)/sets_base $(ON_SETS) $(call minutes,0.25)
	test -d $(UNET) || $(RUN) m2m_jax.to_diffusers --checkpoint $(PRETRAIN)/sets_base --output $(UNET)
	for variant in self dino; do $(RUN) m2m_jax.train --config configs/sets_$$variant.py $(ON_SETS) \
	  --config.init.path=$(UNET) --workdir $(PRETRAIN)/sets_$$variant $(call minutes,0.225) || exit; done

# Each line is skipped, or costs seconds, where it is done; docs/road.md has the hours and what comes out.
road: $(ROAD_ENV)
	mkdir -p $(ROAD)
	$(RUN) m2m_jax.data.prepare --size=32 --directory=data
	test -d data/minilm || $(RUN) m2m_jax.data.prepare_minilm --output=data/minilm
	test -d data/vit_s14 || $(RUN) m2m_jax.data.prepare_vit --output=data/vit_s14
	$(RUN) m2m_jax.train --config configs/emoji_t2i.py --workdir $(ROAD)/t2i
	$(RUN) m2m_jax.data.emoji_captions --output=$(ROAD)/captions.txt --num_captions=2400
	$(RUN) m2m_jax.data.build_mis --captions=$(ROAD)/captions.txt --generator=$(ROAD)/t2i --output=$(ROAD)/data \
	  --sets_per_shard=64 --validation_share=0.04
	$(RUN) m2m_jax.data.show --config configs/emoji.py:road $(ON_MIS) --config.data.images_per_set=12 \
	  --config.data.augment.enabled=False --output=$(ROAD)/mis.png
	$(RUN) m2m_jax.train --config configs/emoji.py:road $(ON_MIS) --workdir $(ROAD)/self_on_mis
	$(RUN) m2m_jax.train --config configs/emoji_dino.py:road $(ON_MIS) --workdir $(ROAD)/dino_on_mis
	$(RUN) m2m_jax.train --config configs/emoji.py:road --workdir $(ROAD)/self_on_emoji
	$(RUN) m2m_jax.train --config configs/emoji_dino.py:road --workdir $(ROAD)/dino_on_emoji
	test -f $(ROAD)/recoloured.json || $(ROAD_EVALUATE) --output=$(ROAD)/recoloured.json
	test -f $(ROAD)/as_drawn.json || $(ROAD_EVALUATE) --output=$(ROAD)/as_drawn.json --config.data.augment.enabled=False
	test -d $(ROAD)/sets || $(RUN) m2m_jax.data.export --config configs/emoji.py:road --split=test --num_sets=12 \
	  --output=$(ROAD)/sets
	for run in $(ROAD_RUNS); do $(RUN) m2m_jax.sample --checkpoint=$(ROAD)/$$run --sets=$(ROAD)/sets --num_context=3 \
	  --num_images=4 --output=$(ROAD)/$$run/test_samples || exit; done
	@echo
	@echo 'Synthetic sets: $(ROAD)/mis.png; losses on real sets: $(ROAD)/recoloured.json, as_drawn.json; contact sheets:'
	@ls $(ROAD)/*/test_samples/contact_sheet.png

test: lint
	$(TEST) pytest $(PYTEST_ARGS)

test-fast: $(TEST_ENV)
	$(TEST) pytest $(PYTEST_ARGS) $(patsubst %,tests/test_%.py,$(FAST))

test-full: lint
	$(TEST) pytest $(PYTEST_ARGS) -m 'slow or not slow'

# A quarter of an hour. FUZZ_ARGS="--seed=1" tries others, --target="image files" --examples=100000 some of one kind.
fuzz: $(TEST_ENV)
	.venv-test/bin/python tests/fuzz.py $(FUZZ_ARGS)

lint: $(TEST_ENV)
	$(TEST) ruff check
	$(TEST) ruff format --check
	$(TEST) mypy

format: $(TEST_ENV)
	$(TEST) ruff check --fix
	$(TEST) ruff format

# A second make, so that PARITY reaches the name of the stamp.
parity:
	@$(MAKE) --no-print-directory lint PARITY=1
	$(TEST) pytest $(PYTEST_ARGS) -m 'slow or not slow' -k parity

# A day on 2 cores, or a night; those that docs/plans has already are not made again.
plan: $(PLAN_ENV)
	.venv-plan/bin/python -m benchmarks.plans

bench:
	@$(MAKE) --no-print-directory lint PARITY=1
	$(TEST) benchmarks.unet_vs_diffusers

bench-context: $(DEMO_ENV)
	$(RUN) benchmarks.context_cost --output=docs/context_cost_cpu.json

# On a machine that does nothing else: the second figure is a fraction of what its noise is.
bench-overhead: $(DEMO_ENV)
	$(RUN) m2m_jax.data.prepare --size=32 --directory=data
	$(RUN) benchmarks.overhead --config $(DEMO_CONFIG)

bench-reading: $(DEMO_ENV)
	$(RUN) m2m_jax.data.prepare --size=32 --directory=data
	$(RUN) benchmarks.mis_reading --config $(DEMO_CONFIG)

soak: $(DEMO_ENV)
	$(RUN) m2m_jax.data.prepare --size=32 --directory=data
	.venv/bin/python tests/soak.py --kills=20
	PYTHONPATH=. .venv/bin/python tests/soak_builds.py --kills=10

sampler:
	rm -rf $(BUILD)/sampler && mkdir -p $(BUILD)/sampler $(dir $(SAMPLER))
	tar cf - $(SAMPLER_FILES) | tar xf - -C $(BUILD)/sampler
	$(SAMPLER_PYTHON) -m zipapp $(BUILD)/sampler --main=m2m_jax.sampling.bundle_program:main --compress \
	  --python='/usr/bin/env python3' --output=$(SAMPLER)
	@echo '$(SAMPLER) --bundle BUNDLE --context a.png,b.png --output out   (bundles: python -m m2m_jax.export)'

clean:
	rm -rf .venv .venv-test .venv-plan $(DEMO_RUN) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist m2m_jax.egg-info
	find m2m_jax configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,<environment>,<pip arguments>,<what to expect>). An environment of another Python version is
# made anew; one that an interrupted install left behind is completed. pip's own output is one line a package.
define install
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo 'error: this needs Python 3.11, 3.12 or 3.13, and PYTHON=$(PYTHON) is $(or $(VERSION),not a Python that starts);' \
	    'name one: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2; }
	@test "$$($(1)/bin/python -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = '$(VERSION)' || { \
	  echo 'Making $(1) (Python $(VERSION))'; $(PYTHON) -m venv --clear $(1); }
	@echo 'Installing into $(1): $(3)'
	@set -o pipefail; $(1)/bin/python -m pip install --compile --disable-pip-version-check --progress-bar off $(2) \
	  | awk '/^Collecting/ { print "  " $$2; fflush() } /^Installing/ { print "  unpacking ..."; fflush() }'
	@touch $@
endef

.venv/.installed-$(VERSION): requirements.txt
	$(call install,.venv,-r requirements.txt,about 1.2 GB and 2 minutes)

.venv/.installed-road-$(VERSION): .venv/.installed-$(VERSION) requirements-dino.txt requirements-text.txt
	$(call install,.venv,-r requirements-dino.txt,0.3 GB)
	$(call install,.venv,--no-deps -r requirements-text.txt,0.1 GB)

.venv/.installed-pretrain-$(VERSION): .venv/.installed-$(VERSION) requirements-dino.txt requirements-perceptual.txt
	$(call install,.venv,-r requirements-dino.txt,0.3 GB)
	$(call install,.venv,--no-deps -r requirements-perceptual.txt,0.1 GB)

.venv-plan/.installed-$(VERSION): requirements.txt requirements-tpu.txt
	$(call install,.venv-plan,-r requirements-tpu.txt,about 1.9 GB and 2 minutes)

.venv-test/.installed-$(VERSION): requirements.txt requirements-test.txt
	$(call install,.venv-test,-r requirements-test.txt,about 2 GB and 3 minutes)

.venv-test/.installed-$(VERSION)-parity: requirements.txt requirements-test.txt requirements-parity.txt
	$(call install,.venv-test,-r requirements-test.txt -r requirements-parity.txt,PyTorch included: about 3.2 GB and 5 minutes)
