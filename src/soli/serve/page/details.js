/** Below the grid: the road of the selected token, and what the selected expert plays. */
import { byId, el, rove } from './elements.js';
import { showExpert } from './expert.js';
import { showRoad } from './road.js';
import { t } from './strings.js';

const MOST_EARLIER = 4000; // tokens of this visitor's earlier texts that are searched for what an expert plays

/**
 * @param {{model: object, nameOf: (row: number, expert: number) => string, numberOf: (row: number) => number, mutes: Set<string>,
 *          toggleMute: (row: number, expert: number) => void, stage: () => import('./stage.js').Stage, simple: () => boolean}} page
 */
export function details({ model, nameOf, numberOf, mutes, toggleMute, stage, simple }) {
  let token = null; // {part, index}
  let chosenExpert = null; // {row, expert}
  let earlier = []; // the scores of this visitor's earlier texts

  function openTab(name) {
    for (const tab of ['token', 'expert']) {
      byId(`tab-${tab}`).setAttribute('aria-selected', String(tab === name));
      byId(`panel-${tab}`).hidden = tab !== name;
    }
    rove([byId('tab-token'), byId('tab-expert')], byId(`tab-${name}`));
  }

  function tokenAgain() {
    if (token) showRoad(byId('panel-token'), { model, score: token.part.score, index: token.index, simple: simple(), chooseExpert: expertChosen });
    else byId('panel-token').replaceChildren(el('p', { class: 'about' }, t('noToken')));
  }

  function tokenChosen(part, index) {
    token = part === null || index === null ? null : { part, index };
    tokenAgain();
    if (token) openTab('token');
  }

  function expertAgain() {
    if (!chosenExpert) {
      byId('panel-expert').replaceChildren(el('p', { class: 'about' }, t('noExpert')));
      return;
    }
    const { row, expert } = chosenExpert;
    const { parts } = stage();
    showExpert(byId('panel-expert'), {
      row, expert, name: nameOf(row, expert), number: numberOf(row), muted: mutes.has(`${row}:${expert}`), parts,
      scores: [...parts.map((part) => part.score), ...earlier],
      toggleMute: () => {
        toggleMute(row, expert);
        byId('mute').focus();
      },
      chooseToken: (part, index) => stage().choose(part, index),
    });
  }

  function expertChosen(row, expert) {
    chosenExpert = { row, expert };
    expertAgain();
    openTab('expert');
  }

  /** The passage on the stage is about to be replaced: it becomes an earlier one. */
  function passageBegins() {
    earlier = [...stage().parts.map((part) => part.score).filter((score) => score.length), ...earlier];
    let tokens = 0;
    earlier = earlier.filter((score) => (tokens += score.length) <= MOST_EARLIER);
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

  return { tokenChosen, tokenAgain, expertChosen, expertAgain, passageBegins };
}
