/** Every word on the page, in both its languages. `{name}` is filled in. */

const EN = {
  skip: 'Skip to the orchestra', intro: 'An [expert] is one of {experts} small networks in each [layer]; for every [token], a word or a part of one, the [router] of the layer chooses {chosen} of them, and these light up.',
  introDense: 'This model has no experts: all of it works for every [token].',
  simple: 'Simple view', detailed: 'Detailed view', examples: 'Try one of these:',
  link: 'Copy link', linkCopied: 'The link is in the clipboard.', linkInBar: 'The link is in the address bar.', save: 'Save as PNG', saved: 'The picture is saved.',
  language: '中文', languageLabel: '换成中文',
  themeAuto: 'Theme: system', themeLight: 'Theme: light', themeDark: 'Theme: dark',
  keyButton: 'API key', keyTitle: 'This server asks for an API key',
  keyHelp: 'It is kept in this page’s memory until you close or reload it, and is stored nowhere.',
  keyLabel: 'API key', keyRefused: 'The server did not accept this key.', keySend: 'Go on', cancel: 'Cancel',
  total: '[parameter|parameters]', activated: '[activated] for each [token]', share: 'of all', heard: '[expert|experts] heard so far',
  heardOf: '{heard} of {all}',
  desk: 'Prompt', mode: 'What to do', translate: 'Translate', complete: 'Complete', chat: 'Chat',
  textTranslate: 'Text to translate', textComplete: 'Text to continue', textChat: 'Message',
  textB: 'Second text (B)', direction: 'Into', guess: 'the other language', en: 'English', zh: 'Chinese',
  compare: 'Compare two texts', muteOnlyB: 'Mute only in B', maxTokens: 'New tokens at most',
  runTranslate: 'Translate', runComplete: 'Continue', runChat: 'Send', stop: 'Stop', answer: 'Answer', answerOf: 'Answer {letter}', thinking: 'Thinking', you: 'You', model: 'Model', newChat: 'New chat',
  mutes: '[muted|Muted] experts', noMutes: 'None. Choose an expert in the grid, then mute it.', unmute: 'Let {name} play again',
  clearMutes: 'Clear all', runAgain: 'Run again',
  orchestra: 'Orchestra', transport: 'Playback', play: 'Play', whatIs: 'What is this: {name}', pause: 'Pause', stepBack: 'Back', step: 'Step', replay: 'Replay',
  speed: 'Speed', perSecond: '{speed} tokens a second', asTheyCome: 'as they come', position: 'Position', of: '{at} of {length}',
  tokens: 'Tokens; choose one to see its road', 
  grid: 'Layers by experts: arrow keys move, Enter chooses an expert, M mutes it',
  gridDifference: 'Difference between A and B, layers by experts', difference: 'Difference',
  legend: 'A row is a [layer], a column an [expert].', legendGroups: 'Bar lines part the [group|groups].',
  legendPlays: '[plays]: the stronger, the more [weight]', legendLetIn: '[letIn|let in] by the [bias]', legendKeptOut: '[keptOut|kept out] by the bias',
  legendNear: '[near|next in line]', legendRoad: '[road|line]: the heaviest in each layer', legendMuted: '[muted]',
  legendMoreA: 'more in A', legendMoreB: 'more in B', common: '[common|weight in common]: {share} %',
  tabToken: 'Token', tabExpert: 'Expert', details: 'Details',
  noToken: 'Choose a token above to see its road through the layers.', noExpert: 'Choose a cell of the grid to see what that expert plays.',
  roadAboutPrompt: '[prompt|Prompt], position {position}. The [bias] changed the choice in {swayed} of {layers} [layer|layers].',
  roadAboutAnswer: 'Answer, position {position}. The [bias] changed the choice in {swayed} of {layers} [layer|layers].',
  roadSigns: '+ [letIn|let in by the bias], − [keptOut|kept out by it], ~ [near|next in line]; the others that are named [plays|play].',
  roadSimplePrompt: 'Read in the [prompt]: the [expert|experts] that play for it in each [layer], with their [weight|weights].',
  roadSimpleAnswer: 'From the answer: the [expert|experts] that play for it in each [layer], with their [weight|weights].',
  expert: 'expert', headExpert: '[expert]', headRole: 'role', headWeight: '[weight]', headAffinity: '[affinity]', headBias: '[bias]', headRanked: '[ranked]', expertNumber: '{expert}',
  plays: 'plays', letIn: 'let in by the bias', keptOut: 'kept out by the bias', near: 'next in line',
  letInShort: 'let in', keptOutShort: 'kept out', nearBy: 'next, by {margin}', keptOutBy: 'kept out, by {margin}', groupOut: 'kept out: group {group} fell',
  countIn: '{count} in', countOut: '{count} out',
  groupsSurvived: '[group|Groups] that survived: {groups} (of {of}).',
  nameOf: '{layer}, expert {expert}', cellPlays: 'plays with {share} % of the weight', cellLetIn: 'plays with {share} % of the weight, let in by the bias',
  cellKeptOut: 'kept out by the bias', cellNear: 'next in line', cellRests: 'rests', cellMuted: ', muted',
  cellPlayed: 'played for {count} of {of} tokens', cellDifference: '{name}: {a} % of its layer in A, {b} % in B',
  mute: 'Mute this expert', unmuteThis: 'Let this expert play', here: 'In this passage, with its [weight]', nothingHere: 'It has not played in this passage.',
  yours: 'In all your texts since you opened this page', nothingYours: 'It has not played in your texts.',
  since: 'On this server since it started', sinceAbout: 'Chosen for {plays} of {read} [token|tokens] ({share} %) in all texts; only numbers are kept. Of these tokens are:',
  neverChosen: 'Not chosen for any of {read} [token|tokens] yet.', kinds: 'What it plays',
  chinese: 'Chinese', english: 'English', digits: 'digits', punctuation: 'punctuation', other: 'other', kindCount: '{kind}: {count}, {share} %',
  asking: 'Asking the model.', done: 'Done: {count} tokens.', stopped: 'Stopped.', failed: 'That did not work: {why}', rate: '{count} [token|tokens] in {seconds} s: [perSecond|{rate} tokens per second]',
  gone: 'The server does not answer; it may have been stopped.', back: 'The server is back.', slow: 'The server is slow: nothing has come for 5 seconds. You can wait or try again.', retry: 'Try again',
  empty: 'Write some text first.', noRouting: 'This model has no routed experts: every parameter plays for every token.',
  loading: 'The server is loading its model.', noModel: 'The server cannot describe its model: {why}',
  aboutParameter: 'A number that the model has learned in training.',
  aboutActivated: 'The parameters that take part in computing one token. The others rest, so a large model can be fast.',
  aboutExpert: 'A small network inside a layer. A layer has many of them, and a few compute each token.',
  aboutLayer: 'The model computes a token in steps, one after another; a step is a layer. The grid has a row for each layer that has experts.',
  aboutToken: 'What a model reads and writes one at a time: a word, a part of a word, a character or a mark.',
  aboutRouter: 'The part of a layer that chooses the experts for a token.',
  aboutWeight: 'How much an expert contributes to a token, in percent of what all experts chosen in that layer contribute.',
  aboutAffinity: 'How well an expert suits a token, as the router of the layer computes it: a number from 0 to 1.',
  aboutBias: 'A number that each expert has and that is added to its affinity for the choice only. Training moves it so that all experts get work.',
  aboutRanked: 'Affinity plus bias. The experts with the highest values are chosen.',
  aboutGroup: 'The experts of a layer form groups. For each token the best groups survive, and only their experts can be chosen.',
  aboutPlays: 'The expert was chosen for the token and computes it. Papers say: selected, or activated.',
  aboutLetIn: 'Chosen because of the bias; without it, another expert would have been. In Soli’s other output: promoted by bias.',
  aboutKeptOut: 'Not chosen because of the bias; without it, this expert would have been. In Soli’s other output: demoted by bias.',
  aboutNear: 'The best expert that was not chosen, and by how much it fell short. In Soli’s other output: runner-up.',
  aboutMuted: 'A muted expert cannot be chosen; others take its place. In the API: masked_experts.',
  aboutRoad: 'The road of a token through the layers: a line from the heaviest expert of one layer to that of the next.',
  aboutCommon: 'The share of weight that both texts give to the same experts. 100 %: the same experts with the same weights.',
  aboutCompare: 'Runs two texts at the same time; a third grid shows in which experts they differ.',
  aboutPrompt: 'What the model reads before it writes: your text, and marks that tell it what to do.',
  aboutPerSecond: 'Tokens of the answer divided by the time from the request to the last token, reading of the prompt included.',
};

const ZH = {
  skip: '跳到乐队', intro: '[expert|专家]是每一[layer|层]中 {experts} 个小网络之一；对每个[token|词元]（一个词或词的一部分），该层的[router|路由器]选出其中 {chosen} 个，被选中的就会亮起。',
  introDense: '此模型没有专家：整个模型都为每个[token|词元]工作。',
  simple: '简单视图', detailed: '详细视图', examples: '试试这些：',
  link: '复制链接', linkCopied: '链接已复制到剪贴板。', linkInBar: '链接已在地址栏中。', save: '保存为 PNG 图片', saved: '图片已保存。',
  language: 'English', languageLabel: 'Switch to English',
  themeAuto: '主题：跟随系统', themeLight: '主题：浅色', themeDark: '主题：深色',
  keyButton: 'API 密钥', keyTitle: '此服务器需要 API 密钥',
  keyHelp: '密钥只保存在本页的内存中，关闭或刷新后即消失，不会存储到任何地方。',
  keyLabel: 'API 密钥', keyRefused: '服务器不接受这个密钥。', keySend: '继续', cancel: '取消',
  total: '[parameter|参数]总数', activated: '每个[token|词元][activated|激活]', share: '占比', heard: '已出场的[expert|专家]',
  heardOf: '{heard} / {all}',
  desk: '输入', mode: '任务', translate: '翻译', complete: '续写', chat: '对话',
  textTranslate: '要翻译的文字', textComplete: '要续写的文字', textChat: '消息',
  textB: '第二段文字（B）', direction: '译成', guess: '另一种语言', en: '英文', zh: '中文',
  compare: '比较两段文字', muteOnlyB: '只在 B 中静音', maxTokens: '最多生成词元数',
  runTranslate: '翻译', runComplete: '续写', runChat: '发送', stop: '停止', answer: '回答', answerOf: '回答 {letter}', thinking: '思考过程', you: '你', model: '模型', newChat: '新对话',
  mutes: '已[muted|静音]的专家', noMutes: '没有。先在网格中选择一位专家，再将其静音。', unmute: '恢复{name}',
  clearMutes: '全部恢复', runAgain: '再演奏一次',
  orchestra: '乐队', transport: '播放', play: '播放', whatIs: '说明：{name}', pause: '暂停', stepBack: '后退', step: '前进', replay: '重播',
  speed: '速度', perSecond: '每秒 {speed} 个词元', asTheyCome: '随到随播', position: '位置', of: '{at} / {length}',
  tokens: '词元；选择一个，查看它的路线', 
  grid: '层与专家的网格：方向键移动，回车选择专家，M 键静音',
  gridDifference: 'A 与 B 的差异，层与专家的网格', difference: '差异',
  legend: '一行是一[layer|层]，一列是一位[expert|专家]。', legendGroups: '小节线分隔各[group|组]。',
  legendPlays: '[plays|演奏]：越浓[weight|权重]越大', legendLetIn: '因[bias|偏置][letIn|入选]', legendKeptOut: '因偏置[keptOut|落选]',
  legendNear: '[near|候补]', legendRoad: '[road|连线]：每层权重最大者', legendMuted: '已[muted|静音]',
  legendMoreA: 'A 中更多', legendMoreB: 'B 中更多', common: '[common|共同权重]：{share} %',
  tabToken: '词元', tabExpert: '专家', details: '详情',
  noToken: '在上面选择一个词元，查看它经过各层的路线。', noExpert: '在网格中选择一格，查看这位专家演奏什么。',
  roadAboutPrompt: '[prompt|输入]，位置 {position}。在 {layers} [layer|层]中，[bias|偏置]改变了 {swayed} 层的选择。',
  roadAboutAnswer: '输出，位置 {position}。在 {layers} [layer|层]中，[bias|偏置]改变了 {swayed} 层的选择。',
  roadSigns: '+ 因偏置[letIn|入选]，− 因偏置[keptOut|落选]，~ [near|候补]；其余列出的专家都在[plays|演奏]。',
  roadSimplePrompt: '在[prompt|输入]中读到：每一[layer|层]为它演奏的[expert|专家]及其[weight|权重]。',
  roadSimpleAnswer: '出自回答：每一[layer|层]为它演奏的[expert|专家]及其[weight|权重]。',
  expert: '专家', headExpert: '[expert|专家]', headRole: '角色', headWeight: '[weight|权重]', headAffinity: '[affinity|亲和度]', headBias: '[bias|偏置]', headRanked: '[ranked|排序分]', expertNumber: '{expert}',
  plays: '演奏', letIn: '因偏置入选', keptOut: '因偏置落选', near: '候补',
  letInShort: '入选', keptOutShort: '落选', nearBy: '候补，差 {margin}', keptOutBy: '落选，差 {margin}', groupOut: '落选：第 {group} 组被淘汰',
  countIn: '入 {count}', countOut: '出 {count}',
  groupsSurvived: '留下的[group|组]：{groups}（共 {of} 组）。',
  nameOf: '{layer}，专家 {expert}', cellPlays: '演奏，占权重 {share} %', cellLetIn: '演奏，占权重 {share} %，因偏置入选',
  cellKeptOut: '因偏置落选', cellNear: '候补', cellRests: '休止', cellMuted: '，已静音',
  cellPlayed: '在 {of} 个词元中演奏了 {count} 个', cellDifference: '{name}：在 A 中占本层 {a} %，在 B 中占 {b} %',
  mute: '将此专家静音', unmuteThis: '恢复此专家', here: '在这一段中，及其[weight|权重]', nothingHere: '它在这一段里没有演奏。',
  yours: '打开本页以来，在您的所有文字中', nothingYours: '它在您的文字里没有演奏。',
  since: '服务器启动以来', sinceAbout: '在所有文字的 {read} 个[token|词元]中入选 {plays} 次（{share} %）；只保留计数。这些词元中：',
  neverChosen: '在 {read} 个[token|词元]中尚未入选。', kinds: '它演奏什么',
  chinese: '中文', english: '英文', digits: '数字', punctuation: '标点', other: '其他', kindCount: '{kind}：{count}，{share} %',
  asking: '正在询问模型。', done: '完成：{count} 个词元。', stopped: '已停止。', failed: '没有成功：{why}', rate: '{count} 个[token|词元]，用时 {seconds} 秒：[perSecond|每秒 {rate} 个词元]',
  gone: '服务器没有回应，可能已停止。', back: '服务器已恢复。', slow: '服务器很慢：已有 5 秒没有任何回应。可以继续等待或重试。', retry: '重试',
  empty: '请先输入文字。', noRouting: '此模型没有路由专家：每个参数都为每个词元演奏。',
  loading: '服务器正在加载模型。', noModel: '服务器无法说明它的模型：{why}',
  aboutParameter: '模型在训练中学到的一个数。',
  aboutActivated: '计算一个词元时参与的参数。其余参数休息，所以大模型也可以很快。',
  aboutExpert: '层内的一个小网络。一层有许多专家，每个词元只由其中几个计算。',
  aboutLayer: '模型一步接一步地计算一个词元，每一步是一层。网格中每个有专家的层占一行。',
  aboutToken: '模型逐个读写的单位：一个词、词的一部分、一个字或一个符号。',
  aboutRouter: '层中为词元选择专家的部分。',
  aboutWeight: '专家对一个词元的贡献，以该层所有入选专家的贡献之和为 100 %。',
  aboutAffinity: '专家与词元的契合程度，由该层的路由器算出，在 0 到 1 之间。',
  aboutBias: '每位专家都有的一个数，只在选择时加到亲和度上。训练会调整它，使所有专家都有工作。',
  aboutRanked: '亲和度加偏置。数值最高的专家入选。',
  aboutGroup: '一层的专家分成若干组。对每个词元，只有最好的几组留下，只有其中的专家可以入选。',
  aboutPlays: '这位专家为该词元入选并参与计算。论文中称为“选中”或“激活”。',
  aboutLetIn: '因偏置而入选；没有偏置，入选的会是另一位专家。Soli 的其他输出中称为 promoted by bias。',
  aboutKeptOut: '因偏置而落选；没有偏置，这位专家本会入选。Soli 的其他输出中称为 demoted by bias。',
  aboutNear: '未入选的专家中最好的一位，以及它差了多少。Soli 的其他输出中称为 runner-up。',
  aboutMuted: '静音的专家不能入选，由其他专家代替。在 API 中是 masked_experts。',
  aboutRoad: '词元经过各层的路线：从一层中权重最大的专家连到下一层中权重最大的专家。',
  aboutCommon: '两段文字给予相同专家的权重所占的份额。100 %：专家相同，权重也相同。',
  aboutCompare: '同时运行两段文字；第三个网格显示它们在哪些专家上不同。',
  aboutPrompt: '模型在写之前读到的内容：您的文字，以及告诉模型做什么的标记。',
  aboutPerSecond: '回答的词元数除以从请求到最后一个词元的时间，包括读取输入的时间。',
};

export const STRINGS = { en: EN, zh: ZH };

let language = /^zh\b/i.test(navigator.language) ? 'zh' : 'en';

export const currentLanguage = () => language;

/** The text of `key` in the page's language, nothing filled in. */
export const template = (key) => STRINGS[language][key];

/** A template with its values. */
export const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));

/** The text of `key` in the page's language. */
export const t = (key, values = {}) => fill(template(key), values);

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
