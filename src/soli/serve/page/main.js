/** Puts the page together: gets the model from the server, then joins desk, stage, details, mutes, link and switches. */
import { Gone, getModel, hasKey, KeyNeeded, NotReady, setKey } from './api.js';
import { Notice, Watch } from './connection.js';
import { Desk } from './desk.js';
import { details } from './details.js';
import { byId, el } from './elements.js';
import { readLink, writeLink } from './link.js';
import { savePicture } from './picture.js';
import { SPEEDS, USUAL_SPEED } from './player.js';
import { Stage } from './stage.js';
import { currentLanguage, large, setLanguage, t } from './strings.js';
import { explain, listenForTerms, rich } from './terms.js';
import { currentView, rememberView, showView } from './view.js';

const THEMES = ['auto', 'light', 'dark'];
const ASK_AGAIN = 1000; // milliseconds, while the server loads its model or cannot be reached
const mutes = new Set(); // "row:expert"
const notice = new Notice();
let model = null;
let stage = null;
let desk = null;
let panels = null;
let afterKey = null;
let tokenOfLink = null; // {part, index}: shown when its answer has come

const numberOf = (row) => Number(/\d+$/.exec(model.layers[row])[0]);
const nameOf = (row, expert) => t('nameOf', { layer: model.layers[row], expert });
const say = (text) => { byId('status').textContent = text; };

function failed(error, again) {
  say('');
  if (error instanceof KeyNeeded) askForKey(again);
  else if (error instanceof Gone) {
    notice.show('gone', {}, again);
    watch.report('gone');
  } else notice.show('failed', { why: error.message }, again);
}

/* The server */

const askNow = () => watch.ask(); // the retry when nothing was being done

let isAway = false; // the server was gone, or is another one that loads its model

const watch = new Watch((state) => {
  if (!model) return; // start() says what is wrong, and goes on
  if (state === 'slow' || (state === 'ready' && !isAway)) {
    if (desk.running) return; // the answer's own patience has more to say
    if (state === 'slow') notice.show('slow', {}, notice.retry ?? askNow);
    else notice.hide('slow');
  } else if (state === 'ready') {
    const { retry } = notice;
    isAway = false;
    notice.hide('gone', 'slow', 'loading');
    recovered(retry === askNow ? null : retry);
  } else {
    isAway = true;
    notice.show(state, {}, notice.retry ?? askNow);
  }
});

/** The server is back: what failed can be tried again; another model than before needs another page. */
async function recovered(retry) {
  try {
    const now = await getModel();
    if (JSON.stringify(now) !== JSON.stringify(model)) location.reload();
    else if (retry) notice.show('back', {}, retry);
  } catch (error) {
    failed(error, () => recovered(retry));
  }
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
  byId('mutes').classList.toggle('detail', mutes.size === 0);
  byId('no-mutes').hidden = mutes.size > 0;
  byId('mute-buttons').hidden = mutes.size === 0;
  stage.mark(stage.parts.map((part) => mutedIn(part.n)));
  panels.expertAgain();
  linkChanged();
}

byId('clear-mutes').onclick = () => {
  mutes.clear();
  mutesChanged();
  byId('run').focus();
};
byId('run-again').onclick = () => desk.runAgain();
byId('only-b').onchange = () => mutesChanged();

/* Link and picture */

function linkChanged() {
  if (!desk?.lastRequest) return;
  const { mode, text, textB, to } = desk.lastRequest;
  byId('link').href = writeLink({
    mode, text, textB, to, masked: [...mutes], onlyB: textB !== null && byId('only-b').checked, view: currentView(),
    token: stage?.chosen?.index ?? tokenOfLink?.index ?? null, part: stage?.chosen?.part.n ?? tokenOfLink?.part ?? 0,
  }, numberOf);
}

byId('link').onclick = async (event) => {
  event.preventDefault();
  history.replaceState(null, '', byId('link').href);
  try {
    await navigator.clipboard.writeText(byId('link').href);
    say(t('linkCopied'));
  } catch {
    say(t('linkInBar'));
  }
  byId('share-status').textContent = byId('status').textContent;
};

byId('save').onclick = async () => {
  await savePicture(stage, { title: byId('intro').textContent, footer: `Soli · ${model.name}`, name: 'soli.png' });
  say(t('saved'));
  byId('share-status').textContent = byId('status').textContent;
};

/** Shows what a link says; false if there is none. */
function openLink() {
  const link = readLink(location.hash, model, numberOf);
  if (!link) return false;
  mutes.clear();
  for (const pair of link.masked) mutes.add(pair);
  byId('compare').checked = link.textB !== null;
  byId('only-b').checked = link.onlyB;
  if (link.view ?? link.textB) changeView(link.view === 'detailed' || link.textB !== null ? 'detailed' : 'simple');
  desk.choose(link.mode);
  byId('direction').value = link.to;
  if (link.text !== null) byId('text-a').value = link.text;
  if (link.textB !== null) byId('text-b').value = link.textB;
  mutesChanged();
  tokenOfLink = link.token === null ? null : { part: link.part, index: link.token };
  if (link.text === null) desk.runExample();
  else desk.run();
  return true;
}

window.addEventListener('hashchange', () => {
  if (desk && location.hash !== new URL(byId('link').href).hash) openLink();
});

function showTokenOfLink() {
  const part = stage?.parts[tokenOfLink?.part];
  if (part && tokenOfLink.index < part.score.length) stage.choose(part, tokenOfLink.index);
  tokenOfLink = null;
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
  for (const id of ['play', 'step-back', 'step', 'replay', 'seek', 'save']) byId(id).disabled = length === 0;
  byId('play').textContent = t(player.sounding ? 'pause' : 'play');
  byId('seek').max = String(length);
  byId('seek').value = String(player.position);
  byId('seek').setAttribute('aria-valuetext', t('of', { at: player.position, length }));
  byId('at').textContent = t('of', { at: player.position, length });
  const heard = parts.map((part) => part.lights.heard).join(' / ');
  byId('heard').textContent = t('heardOf', { heard, all: model.layers.length * model.experts });
  const common = stage.common === null ? '' : String(Math.round(100 * stage.common));
  if (byId('common').dataset.share !== common + currentLanguage()) { // its term must not lose the focus at every token
    byId('common').dataset.share = common + currentLanguage();
    byId('common').replaceChildren(...(common ? rich('common', { share: common }) : []));
  }
}

function showCounters() {
  byId('model-name').textContent = model.name;
  byId('total').textContent = large(model.total);
  byId('activated').textContent = large(model.activated);
  byId('share').textContent = `${((100 * model.activated) / model.total).toPrecision(3)} %`;
  byId('legend-groups').hidden = model.groups < 2;
  byId('intro').replaceChildren(...rich(stage ? 'intro' : 'introDense', { experts: model.experts, chosen: model.chosen }));
}

/* Switches */

function speak(language) {
  setLanguage(language);
  explain();
  notice.translate();
  say('');
  byId('share-status').textContent = '';
  byId('theme').textContent = t(themeKey());
  byId('view').textContent = t(currentView() === 'simple' ? 'detailed' : 'simple');
  byId('speed').replaceChildren(...SPEEDS.map((speed) => el('option', { value: String(speed) },
    speed === Infinity ? t('asTheyCome') : t('perSecond', { speed }))));
  byId('speed').value = String(stage?.player.speed ?? USUAL_SPEED);
  if (!model) return;
  showCounters();
  desk.dress();
  stage?.rename();
  mutesChanged();
  panels?.tokenAgain();
  moved();
}

/** The simple view shows who plays; the detailed one every number and control. */
function changeView(view) {
  showView(view);
  byId('view').textContent = t(view === 'simple' ? 'detailed' : 'simple');
  if (!desk) return;
  if (view === 'simple' && desk.compared) byId('compare').click(); // what cannot be seen is not done either
  if (stage) stage.simple = view === 'simple';
  stage?.moved();
  stage?.refit();
  panels?.tokenAgain();
  linkChanged();
}

const theme = () => document.documentElement.dataset.theme;
const themeKey = () => `theme${theme()[0].toUpperCase()}${theme().slice(1)}`;

byId('view').onclick = () => {
  changeView(currentView() === 'simple' ? 'detailed' : 'simple');
  rememberView();
};
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
    if (error instanceof NotReady) notice.show('loading');
    else if (error instanceof Gone) notice.show('gone', {}, start);
    else notice.show('noModel', { why: error.message }, start);
    setTimeout(start, ASK_AGAIN);
    return;
  }
  notice.hide();
  const dense = model.layers.length === 0; // nothing is chosen, so there is nothing to show but the answer
  byId('stage').hidden = dense;
  byId('mutes').hidden = dense;
  byId('heard-line').hidden = dense;
  byId('no-routing').hidden = !dense;
  panels = dense ? null : details({ model, nameOf, numberOf, mutes, toggleMute, stage: () => stage, simple: () => currentView() === 'simple' });
  stage = dense ? null : new Stage(model, {
    tokenChosen: (part, index) => {
      panels.tokenChosen(part, index);
      linkChanged();
    },
    expertChosen: panels.expertChosen, muteToggled: toggleMute, moved, more: () => desk?.running ?? false, nameOf,
  });
  desk = new Desk(model, {
    begin: (count) => {
      notice.hide();
      document.body.classList.toggle('comparing', count > 1);
      panels?.passageBegins();
      stage?.begin(count);
      mutesChanged();
      byId('share-status').textContent = '';
    },
    take: (n, tokens) => stage?.take(n, tokens),
    mutesOf: (n) => [...mutedIn(n)].map((pair) => pair.split(':').map(Number)).map(([row, expert]) => [numberOf(row), expert]),
    failed: (error) => failed(error, () => desk.runAgain()),
    slow: (retry) => notice.show('slow', {}, retry),
    going: () => notice.hide('slow'),
    chosen: () => notice.hide('failed'),
    done: () => {
      say(stage ? t('done', { count: stage.player.piece.length() }) : '');
      moved();
      stage?.tiers.ask();
      panels?.expertAgain();
      if (tokenOfLink) showTokenOfLink();
    },
    say,
  });
  document.body.classList.remove('loading');
  changeView(currentView());
  speak(currentLanguage());
  if (!openLink()) desk.runExample();
}

listenForTerms();
speak(currentLanguage());
start();
