/** Puts the page together: asks the server for its model, then joins desk, stage, details, mutes and switches. */
import { getModel, hasKey, KeyNeeded, NotReady, setKey } from './api.js';
import { Desk } from './desk.js';
import { byId, el, rove } from './elements.js';
import { showExpert } from './expert.js';
import { SPEEDS, USUAL_SPEED } from './player.js';
import { showRoad } from './road.js';
import { Stage } from './stage.js';
import { currentLanguage, large, setLanguage, t } from './strings.js';

const THEMES = ['auto', 'light', 'dark'];
const ASK_AGAIN = 1000; // milliseconds, while the server loads its model or cannot be reached
const mutes = new Set(); // "row:expert"
let model = null;
let stage = null;
let desk = null;
let shownExpert = null; // {row, expert}
let afterKey = null;

const numberOf = (row) => Number(/\d+$/.exec(model.layers[row])[0]);
const nameOf = (row, expert) => t('nameOf', { layer: model.layers[row], expert });
const say = (text) => { byId('status').textContent = text; };

function failed(error, again) {
  if (error instanceof KeyNeeded) {
    askForKey(again);
    return;
  }
  byId('alert').textContent = t('failed', { why: error.message });
  byId('alert').hidden = false;
  say('');
}

/* The key */

function askForKey(again) {
  afterKey = again;
  byId('key-refused').hidden = !hasKey();
  byId('key-input').value = '';
  if (!byId('key-dialog').open) byId('key-dialog').showModal();
}

byId('key-form').onsubmit = () => {
  setKey(byId('key-input').value);
  byId('key-input').value = '';
  byId('key-button').hidden = false;
  afterKey?.();
};
byId('key-cancel').onclick = () => byId('key-dialog').close();
byId('key-button').onclick = () => askForKey(null);

/* Mutes */

/** A part's muted cells: "mute only in B" leaves A as it is. */
const mutedIn = (n) => (desk.compared && n === 0 && byId('only-b').checked ? new Set() : mutes);

function toggleMute(row, expert) {
  const pair = `${row}:${expert}`;
  if (!mutes.delete(pair)) mutes.add(pair);
  mutesChanged();
}

function mutesChanged() {
  if (!stage) return;
  const chips = [...mutes].map((pair) => {
    const [row, expert] = pair.split(':').map(Number);
    return el('li', {}, el('button', {
      type: 'button', class: 'chip', 'aria-label': t('unmute', { name: nameOf(row, expert) }), onClick: () => {
        toggleMute(row, expert);
        (byId('mute-list').querySelector('button') ?? byId('run')).focus(); // the button pressed is gone
      },
    }, `${model.layers[row].replace(/^.*\./, '')}·${expert} ×`));
  });
  byId('mute-list').replaceChildren(...chips);
  byId('no-mutes').hidden = mutes.size > 0;
  byId('mute-buttons').hidden = mutes.size === 0;
  stage.mark(stage.parts.map((part) => mutedIn(part.n)));
  showChosenExpert();
}

byId('clear-mutes').onclick = () => {
  mutes.clear();
  mutesChanged();
  byId('run').focus();
};
byId('run-again').onclick = () => desk.run();
byId('only-b').onchange = () => mutesChanged();

/* Details: a token's road, an expert's repertoire */

function openTab(name) {
  for (const tab of ['token', 'expert']) {
    byId(`tab-${tab}`).setAttribute('aria-selected', String(tab === name));
    byId(`panel-${tab}`).hidden = tab !== name;
  }
  rove([byId('tab-token'), byId('tab-expert')], byId(`tab-${name}`));
}

function tokenChosen(part, index) {
  if (part === null || index === null) {
    byId('panel-token').replaceChildren(el('p', { class: 'about' }, t('noToken')));
    return;
  }
  showRoad(byId('panel-token'), { model, score: part.score, index, chooseExpert: expertChosen });
  openTab('token');
}

function expertChosen(row, expert) {
  shownExpert = { row, expert };
  showChosenExpert();
  openTab('expert');
}

function showChosenExpert() {
  if (!shownExpert) {
    byId('panel-expert').replaceChildren(el('p', { class: 'about' }, t('noExpert')));
    return;
  }
  const { row, expert } = shownExpert;
  showExpert(byId('panel-expert'), {
    row, expert, name: nameOf(row, expert), number: numberOf(row), muted: mutes.has(`${row}:${expert}`), parts: stage.parts,
    toggleMute: () => {
      toggleMute(row, expert);
      byId('mute').focus();
    },
    chooseToken: (part, index) => stage.choose(part, index),
  });
}

for (const tab of ['token', 'expert']) {
  byId(`tab-${tab}`).onclick = () => openTab(tab);
  byId(`tab-${tab}`).onkeydown = (event) => {
    if (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight') return;
    const other = tab === 'token' ? 'expert' : 'token';
    openTab(other);
    byId(`tab-${other}`).focus();
  };
}

/* Playback and counters */

byId('play').onclick = () => stage.toggle();
byId('step').onclick = () => stage.step(1);
byId('step-back').onclick = () => stage.step(-1);
byId('replay').onclick = () => stage.replay();
byId('seek').oninput = (event) => stage.seek(Number(event.target.value));
byId('speed').onchange = (event) => {
  stage.player.speed = Number(event.target.value);
  stage.wake();
};

function moved() {
  if (!stage) return;
  const { player, parts } = stage;
  const length = player.piece.length();
  for (const id of ['play', 'step-back', 'step', 'replay', 'seek']) byId(id).disabled = length === 0;
  byId('play').textContent = t(player.sounding ? 'pause' : 'play');
  byId('seek').max = String(length);
  byId('seek').value = String(player.position);
  byId('seek').setAttribute('aria-valuetext', t('of', { at: player.position, length }));
  byId('at').textContent = t('of', { at: player.position, length });
  const heard = parts.map((part) => part.lights.heard).join(' / ');
  byId('heard').textContent = t('heardOf', { heard, all: model.layers.length * model.experts });
  byId('common').textContent = stage.common === null ? '' : t('common', { share: Math.round(100 * stage.common) });
}

function showCounters() {
  byId('model-name').textContent = model.name;
  byId('total').textContent = large(model.total);
  byId('activated').textContent = large(model.activated);
  byId('share').textContent = `${((100 * model.activated) / model.total).toPrecision(3)} %`;
}

/* Switches */

function speak(language) {
  setLanguage(language);
  byId('alert').hidden = byId('alert').hidden || model !== null; // what it said, it said in the other language
  byId('theme').textContent = t(themeKey());
  byId('speed').replaceChildren(...SPEEDS.map((speed) => el('option', { value: String(speed) },
    speed === Infinity ? t('asTheyCome') : t('perSecond', { speed }))));
  byId('speed').value = String(stage?.player.speed ?? USUAL_SPEED);
  if (!model) return;
  showCounters();
  desk.dress();
  stage?.rename();
  mutesChanged();
  tokenChosen(stage?.chosen?.part ?? null, stage?.chosen?.index ?? null);
  moved();
}

const theme = () => document.documentElement.dataset.theme;
const themeKey = () => `theme${theme()[0].toUpperCase()}${theme().slice(1)}`;

byId('theme').onclick = () => {
  document.documentElement.dataset.theme = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  byId('theme').textContent = t(themeKey());
  stage?.recolour();
};
byId('language').onclick = () => speak(currentLanguage() === 'zh' ? 'en' : 'zh');

async function start() {
  try {
    model = await getModel();
  } catch (error) {
    if (error instanceof KeyNeeded) {
      askForKey(start);
      return;
    }
    byId('alert').textContent = error instanceof NotReady ? t('loading') : t('noModel', { why: error.message });
    byId('alert').hidden = false;
    setTimeout(start, ASK_AGAIN);
    return;
  }
  byId('alert').hidden = true;
  const dense = model.layers.length === 0; // nothing is chosen, so there is nothing to show but the answer
  byId('stage').hidden = dense;
  byId('mutes').hidden = dense;
  byId('no-routing').hidden = !dense;
  stage = dense ? null : new Stage(model, { tokenChosen, expertChosen, muteToggled: toggleMute, moved, more: () => desk?.running ?? false, nameOf });
  desk = new Desk(model, {
    begin: (count) => {
      byId('alert').hidden = true;
      document.body.classList.toggle('comparing', count > 1);
      stage?.begin(count);
      mutesChanged();
    },
    take: (n, tokens) => stage?.take(n, tokens),
    mutesOf: (n) => [...mutedIn(n)].map((pair) => pair.split(':').map(Number)).map(([row, expert]) => [numberOf(row), expert]),
    failed: (error) => failed(error, () => desk.run()),
    chosen: () => { byId('alert').hidden = true; },
    done: () => {
      say(stage ? t('done', { count: stage.player.piece.length() }) : '');
      moved();
      if (!byId('panel-expert').hidden) showChosenExpert();
    },
    say,
  });
  document.body.classList.remove('loading');
  speak(currentLanguage());
}

speak(currentLanguage());
start();
