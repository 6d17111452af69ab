/**
 * The desk on the left: what is asked, in which mode, and what the model answers. It builds requests and reads their
 * streams; what the tokens' routing looks like is the stage's affair.
 */
import { asking, stream } from './api.js';
import { SLOW_AFTER } from './connection.js';
import { byId, el, rove } from './elements.js';
import { EXAMPLES, SECOND } from './examples.js';
import { t } from './strings.js';
import { rich } from './terms.js';

const USUAL_TOKENS = { complete: 48, chat: 256 };
const TEXT = { translate: 'textTranslate', complete: 'textComplete', chat: 'textChat' };
const RUN = { translate: 'runTranslate', complete: 'runComplete', chat: 'runChat' };
const EXAMPLE_TOKENS = 48; // of an answer that nobody asked for

export class Desk {
  /**
   * @param {object} model
   * @param {{begin: (parts: number) => void, take: (n: number, tokens: object[]) => void,
   *          mutesOf: (n: number) => number[][], failed: (error: Error) => void, slow: (retry: () => void) => void, going: () => void,
   *          chosen: () => void, done: () => void, say: (text: string) => void}} does  `slow`: nothing has come for a while;
   *   `going`: it comes again
   */
  constructor(model, does) {
    Object.assign(this, { model, does, past: [], abort: null, lastRequest: null, forExample: false });
    [this.mode] = model.modes;
    byId('modes').replaceChildren(...model.modes.map((mode) => el('button', {
      type: 'button', role: 'radio', id: `mode-${mode}`, data: { mode, t: mode }, onClick: () => mode === this.mode || this.choose(mode),
    })));
    byId('modes').onkeydown = (event) => this.key(event);
    byId('ask').onsubmit = (event) => {
      event.preventDefault();
      this.run();
    };
    byId('stop').onclick = () => this.abort?.abort();
    byId('compare').onchange = () => this.dress();
    byId('new-chat').onclick = () => this.forget();
    for (const area of [byId('text-a'), byId('text-b')]) area.onkeydown = (event) => {
      if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) byId('ask').requestSubmit();
    };
    byId('max-tokens').max = String(model.context);
    this.choose(this.mode);
  }

  get compared() { return byId('compare').checked; }

  get running() { return this.abort !== null; }

  choose(mode) {
    this.does.chosen();
    const untouched = (id, examples) => ['', ...examples].includes(byId(id).value);
    if (untouched('text-a', Object.values(EXAMPLES).flat())) byId('text-a').value = mode === 'chat' ? '' : EXAMPLES[mode][0];
    if (untouched('text-b', Object.values(SECOND))) byId('text-b').value = SECOND[mode];
    this.mode = mode;
    if (USUAL_TOKENS[mode]) byId('max-tokens').value = USUAL_TOKENS[mode];
    this.forget();
    this.dress();
  }

  key(event) {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const all = this.model.modes;
    const mode = all[(all.indexOf(this.mode) + by + all.length) % all.length];
    this.choose(mode);
    byId(`mode-${mode}`).focus();
  }

  /** Shows the controls that the mode has, with their names in the page's language. */
  dress() {
    const buttons = [...byId('modes').children];
    for (const button of buttons) {
      button.textContent = t(button.dataset.mode);
      button.setAttribute('aria-checked', String(button.dataset.mode === this.mode));
    }
    rove(buttons, byId(`mode-${this.mode}`));
    byId('label-a').textContent = t(TEXT[this.mode]) + (this.compared ? ' (A)' : '');
    byId('run').textContent = t(RUN[this.mode]);
    byId('direction-line').hidden = this.mode !== 'translate';
    byId('tokens-line').hidden = this.mode === 'translate';
    byId('max-tokens').disabled = this.mode === 'translate'; // what is not seen is not checked either
    byId('line-b').hidden = !this.compared;
    byId('only-b-line').hidden = !this.compared;
    document.body.classList.toggle('chatting', this.mode === 'chat' && !this.compared);
    byId('examples').replaceChildren(...EXAMPLES[this.mode].map((text) => el('button', {
      type: 'button', class: 'example', lang: /[\u4e00-\u9fff]/.test(text) ? 'zh-CN' : 'en', onClick: () => this.offer(text),
    }, text)));
    byId('new-chat').hidden = this.mode !== 'chat' || this.compared || !this.past.length;
    byId('run').hidden = this.running;
    byId('stop').hidden = !this.running;
  }

  /** Takes an example and runs it. */
  offer(text) {
    byId('text-a').value = text;
    byId('direction').value = '';
    this.run();
  }

  /** What runs when the page opens, so that there is something to see: the first example, briefly. */
  runExample() { return this.run(EXAMPLES[this.mode][0]); }

  forget() {
    this.past = [];
    byId('answers').replaceChildren();
    this.dress();
  }

  /**
   * Asks the model, once or (to compare) twice at the same time, and gives its tokens to the stage. An `example` is
   * answered briefly and, in a chat, not remembered.
   */
  async run(example = null) {
    const texts = example === null ? (this.compared ? ['text-a', 'text-b'] : ['text-a']).map((id) => byId(id).value) : [example];
    if (texts.some((text) => !text.trim())) {
      this.does.failed(new Error(t('empty')));
      return;
    }
    this.abort?.abort();
    const abort = new AbortController();
    this.abort = abort;
    this.lastRequest = { mode: this.mode, text: texts[0], textB: texts[1] ?? null, to: byId('direction').value, example };
    this.does.begin(texts.length);
    this.dress();
    this.does.say(t('asking'));
    const chatting = this.mode === 'chat' && !this.compared;
    if (!chatting || this.forExample) byId('answers').replaceChildren();
    this.forExample = example !== null;
    try {
      const answers = await Promise.all(texts.map((text, n) => this.ask(text, n, texts.length > 1, abort.signal)));
      if (chatting && example === null) {
        this.past.push({ role: 'user', content: texts[0] }, { role: 'assistant', content: answers[0] });
        byId('text-a').value = '';
      }
      this.does.done();
    } catch (error) {
      const wasAborted = abort.signal.aborted; // by the person, or by a newer run
      abort.abort(); // one of two failed: the other need not go on
      if (!wasAborted) this.does.failed(error);
      else if (this.abort === abort) this.does.say(t('stopped'));
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.dress();
      }
    }
  }

  async ask(text, n, compared, signal) {
    const [path, body] = asking(this.mode, text, {
      to: byId('direction').value, past: compared || this.forExample ? [] : this.past,
      maxTokens: this.forExample ? EXAMPLE_TOKENS : Number(byId('max-tokens').value),
      name: this.model.name, mutes: this.does.mutesOf(n),
    });
    const { box, words, thoughts } = this.answerBox(text, compared ? 'AB'[n] : null);
    let answer = '';
    let written = 0; // tokens
    const start = performance.now();
    const waiting = this.patience(signal);
    try {
      for await (const event of stream(path, body, signal)) {
        waiting.again();
        if (event.soli?.tokens?.length) this.does.take(n, event.soli.tokens);
        written += event.soli?.tokens?.filter((token) => token.part === 'answer').length ?? 0;
        const choice = event.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? '';
        const thought = choice?.delta?.reasoning_content ?? '';
        if (thought) thoughts(thought);
        if (piece) words.appendData(piece);
        answer += piece;
      }
      const seconds = (performance.now() - start) / 1000;
      if (written) box.append(el('p', { class: 'about rate' }, ...rich('rate', {
        count: written, seconds: seconds.toFixed(seconds < 10 ? 2 : 0), rate: (written / seconds).toFixed(written < 10 * seconds ? 1 : 0),
      })));
    } finally {
      waiting.end();
      box.setAttribute('aria-busy', 'false');
    }
    return answer;
  }

  /** Tells when nothing has come for a while; `again` when something has, `end` when nothing more is waited for. */
  patience(signal) {
    let timer = 0;
    let slow = false;
    const end = () => {
      clearTimeout(timer);
      if (slow && !signal.aborted) this.does.going();
      slow = false;
    };
    const again = () => {
      end();
      timer = setTimeout(() => {
        slow = true;
        if (!signal.aborted) this.does.slow(() => this.runAgain());
      }, SLOW_AFTER);
    };
    again();
    return { again, end };
  }

  /** What is written once more; the example if nothing is. */
  runAgain() { return this.run(byId('text-a').value.trim() ? null : this.lastRequest?.example ?? null); }

  /** A place for an answer, read out when it is complete. */
  answerBox(text, letter) {
    const words = document.createTextNode('');
    const box = el('div', { class: 'reply', 'aria-live': 'polite', 'aria-busy': 'true' });
    if (this.mode === 'chat') box.append(el('p', { class: 'mine' }, el('b', { class: 'who' }, t('you')), text));
    const heading = letter ? t('answerOf', { letter }) : t(this.mode === 'chat' ? 'model' : 'answer');
    const words_ = el('p', { class: 'words' }, words);
    box.append(el('b', { class: 'who' }, heading), words_);
    if (this.mode === 'complete') words_.prepend(el('span', { class: 'given' }, text));
    byId('answers').append(box);
    let reasoning = null;
    const thoughts = (piece) => {
      if (!reasoning) {
        reasoning = document.createTextNode('');
        words_.before(el('details', { class: 'thoughts', open: true }, el('summary', {}, t('thinking')), el('p', {}, reasoning)));
      }
      reasoning.appendData(piece);
    };
    return { box, words, thoughts };
  }
}
