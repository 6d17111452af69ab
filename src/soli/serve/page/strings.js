/** Every word on the page, in both its languages. `{name}` is filled in. */

const EN = {
  skip: 'Skip to the orchestra',
  language: '中文', languageLabel: '换成中文',
  themeAuto: 'Theme: system', themeLight: 'Theme: light', themeDark: 'Theme: dark',
  keyButton: 'API key', keyTitle: 'This server asks for an API key',
  keyHelp: 'It is kept in this page’s memory until you close or reload it, and is stored nowhere.',
  keyLabel: 'API key', keyRefused: 'The server did not accept this key.', keySend: 'Go on', cancel: 'Cancel',
  total: 'parameters', activated: 'play for each token', share: 'of all', heard: 'experts heard so far',
  heardOf: '{heard} of {all}',
  desk: 'Prompt', mode: 'What to do', translate: 'Translate', complete: 'Complete', chat: 'Chat',
  textTranslate: 'Text to translate', textComplete: 'Text to continue', textChat: 'Message',
  textB: 'Second text (B)', direction: 'Into', guess: 'the other language', en: 'English', zh: 'Chinese',
  compare: 'Compare two texts', muteOnlyB: 'Mute only in B', maxTokens: 'New tokens at most',
  runTranslate: 'Translate', runComplete: 'Continue', runChat: 'Send', stop: 'Stop', answer: 'Answer', answerOf: 'Answer {letter}', thinking: 'Thinking', you: 'You', model: 'Model', newChat: 'New chat',
  mutes: 'Muted experts', noMutes: 'None. Choose an expert in the grid, then mute it.', unmute: 'Let {name} play again',
  clearMutes: 'Clear all', runAgain: 'Run again',
  orchestra: 'Orchestra', transport: 'Playback', play: 'Play', pause: 'Pause', stepBack: 'Back', step: 'Step', replay: 'Replay',
  speed: 'Speed', perSecond: '{speed} tokens a second', asTheyCome: 'as they come', position: 'Position', of: '{at} of {length}',
  tokens: 'Tokens; choose one to see its road', prompt: 'prompt', answerPart: 'answer',
  grid: 'Layers by experts: arrow keys move, Enter chooses an expert, M mutes it',
  gridDifference: 'Difference between A and B, layers by experts', difference: 'Difference',
  legend: 'A row is a layer, a column an expert; bar lines part the groups.',
  legendPlays: 'plays: the stronger, the more weight', legendLetIn: 'let in by the bias', legendKeptOut: 'kept out by the bias',
  legendNear: 'next in line', legendRoad: 'line: the heaviest in each layer', legendMuted: 'muted',
  legendMoreA: 'more in A', legendMoreB: 'more in B', common: 'weight in common: {share} %',
  tabToken: 'Token', tabExpert: 'Expert', details: 'Details',
  noToken: 'Choose a token above to see its road through the layers.', noExpert: 'Choose a cell of the grid to see what that expert plays.',
  roadAbout: '{part}, position {position}. The bias changed the choice in {swayed} of {layers} layers.',
  expert: 'expert', role: 'role', weight: 'weight', affinity: 'affinity', bias: 'bias', ranked: 'ranked', expertNumber: '{expert}',
  plays: 'plays', letIn: 'let in by the bias', keptOut: 'kept out by the bias', near: 'next in line',
  letInShort: 'let in', keptOutShort: 'kept out', nearBy: 'next, by {margin}', keptOutBy: 'kept out, by {margin}', groupOut: 'kept out: group {group} fell',
  countIn: '{count} in', countOut: '{count} out',
  groupsSurvived: 'Groups that survived: {groups} (of {of}).',
  nameOf: '{layer}, expert {expert}', cellPlays: 'plays with {share} % of the weight', cellLetIn: 'plays with {share} % of the weight, let in by the bias',
  cellKeptOut: 'kept out by the bias', cellNear: 'next in line', cellRests: 'rests', cellMuted: ', muted',
  cellPlayed: 'played for {count} of {of} tokens', cellDifference: '{name}: {a} % of its layer in A, {b} % in B',
  mute: 'Mute this expert', unmuteThis: 'Let this expert play', here: 'Here', nothingHere: 'It has not played in this passage.',
  since: 'Since the server started', sinceAbout: 'Chosen for {plays} of {read} tokens. With the highest weight:',
  neverChosen: 'Not chosen for any of {read} tokens yet.', kinds: 'What it plays',
  chinese: 'Chinese', english: 'English', digits: 'digits', punctuation: 'punctuation', other: 'other', kindCount: '{kind}: {count}, {share} %',
  asking: 'Asking the model.', done: 'Done: {count} tokens.', stopped: 'Stopped.', failed: 'That did not work: {why}',
  empty: 'Write some text first.', noRouting: 'This model has no routed experts: every parameter plays for every token.',
  loading: 'The server is loading its model.', noModel: 'The server does not answer: {why}',
};

const ZH = {
  skip: '跳到乐队',
  language: 'English', languageLabel: 'Switch to English',
  themeAuto: '主题：跟随系统', themeLight: '主题：浅色', themeDark: '主题：深色',
  keyButton: 'API 密钥', keyTitle: '此服务器需要 API 密钥',
  keyHelp: '密钥只保存在本页的内存中，关闭或刷新后即消失，不会存储到任何地方。',
  keyLabel: 'API 密钥', keyRefused: '服务器不接受这个密钥。', keySend: '继续', cancel: '取消',
  total: '参数总数', activated: '每个词元激活', share: '占比', heard: '已出场的专家',
  heardOf: '{heard} / {all}',
  desk: '输入', mode: '任务', translate: '翻译', complete: '续写', chat: '对话',
  textTranslate: '要翻译的文字', textComplete: '要续写的文字', textChat: '消息',
  textB: '第二段文字（B）', direction: '译成', guess: '另一种语言', en: '英文', zh: '中文',
  compare: '比较两段文字', muteOnlyB: '只在 B 中静音', maxTokens: '最多生成词元数',
  runTranslate: '翻译', runComplete: '续写', runChat: '发送', stop: '停止', answer: '回答', answerOf: '回答 {letter}', thinking: '思考过程', you: '你', model: '模型', newChat: '新对话',
  mutes: '已静音的专家', noMutes: '没有。先在网格中选择一位专家，再将其静音。', unmute: '恢复{name}',
  clearMutes: '全部恢复', runAgain: '再演奏一次',
  orchestra: '乐队', transport: '播放', play: '播放', pause: '暂停', stepBack: '后退', step: '前进', replay: '重播',
  speed: '速度', perSecond: '每秒 {speed} 个词元', asTheyCome: '随到随播', position: '位置', of: '{at} / {length}',
  tokens: '词元；选择一个，查看它的路线', prompt: '输入', answerPart: '输出',
  grid: '层与专家的网格：方向键移动，回车选择专家，M 键静音',
  gridDifference: 'A 与 B 的差异，层与专家的网格', difference: '差异',
  legend: '一行是一层，一列是一位专家；小节线分隔各组。',
  legendPlays: '演奏：越浓权重越大', legendLetIn: '因偏置入选', legendKeptOut: '因偏置落选',
  legendNear: '候补', legendRoad: '连线：每层权重最大者', legendMuted: '已静音',
  legendMoreA: 'A 中更多', legendMoreB: 'B 中更多', common: '共同权重：{share} %',
  tabToken: '词元', tabExpert: '专家', details: '详情',
  noToken: '在上面选择一个词元，查看它经过各层的路线。', noExpert: '在网格中选择一格，查看这位专家演奏什么。',
  roadAbout: '{part}，位置 {position}。在 {layers} 层中，偏置改变了 {swayed} 层的选择。',
  expert: '专家', role: '角色', weight: '权重', affinity: '亲和度', bias: '偏置', ranked: '排序分', expertNumber: '{expert}',
  plays: '演奏', letIn: '因偏置入选', keptOut: '因偏置落选', near: '候补',
  letInShort: '入选', keptOutShort: '落选', nearBy: '候补，差 {margin}', keptOutBy: '落选，差 {margin}', groupOut: '落选：第 {group} 组被淘汰',
  countIn: '入 {count}', countOut: '出 {count}',
  groupsSurvived: '留下的组：{groups}（共 {of} 组）。',
  nameOf: '{layer}，专家 {expert}', cellPlays: '演奏，占权重 {share} %', cellLetIn: '演奏，占权重 {share} %，因偏置入选',
  cellKeptOut: '因偏置落选', cellNear: '候补', cellRests: '休止', cellMuted: '，已静音',
  cellPlayed: '在 {of} 个词元中演奏了 {count} 个', cellDifference: '{name}：在 A 中占本层 {a} %，在 B 中占 {b} %',
  mute: '将此专家静音', unmuteThis: '恢复此专家', here: '在这一段', nothingHere: '它在这一段里没有演奏。',
  since: '服务器启动以来', sinceAbout: '在 {read} 个词元中入选 {plays} 次。权重最高的有：',
  neverChosen: '在 {read} 个词元中尚未入选。', kinds: '它演奏什么',
  chinese: '中文', english: '英文', digits: '数字', punctuation: '标点', other: '其他', kindCount: '{kind}：{count}，{share} %',
  asking: '正在询问模型。', done: '完成：{count} 个词元。', stopped: '已停止。', failed: '没有成功：{why}',
  empty: '请先输入文字。', noRouting: '此模型没有路由专家：每个参数都为每个词元演奏。',
  loading: '服务器正在加载模型。', noModel: '服务器没有回应：{why}',
};

export const STRINGS = { en: EN, zh: ZH };

let language = /^zh\b/i.test(navigator.language) ? 'zh' : 'en';

export const currentLanguage = () => language;

/** The text of `key` in the page's language. */
export function t(key, values = {}) {
  return STRINGS[language][key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** Sets the language and every text of the page that is marked with data-t or data-t-label. */
export function setLanguage(wanted) {
  language = wanted;
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const one of document.querySelectorAll('[data-t]')) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll('[data-t-label]')) one.setAttribute('aria-label', t(one.dataset.tLabel));
}

/** A count as people read it: 671B, 6710亿. */
export function large(value) {
  return new Intl.NumberFormat(language === 'zh' ? 'zh-CN' : 'en', { notation: 'compact', maximumSignificantDigits: 3 }).format(value);
}
