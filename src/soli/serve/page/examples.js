/**
 * The texts that the page offers. TRANSLATIONS are sentences that the bundled model translates correctly, each with its
 * translation; the table is JSON, so that tests/serve/page/test_page_examples.py can compare it with what the model
 * says now. After another model is bundled that test names the lines to change. The first one runs when the page opens.
 */
export const TRANSLATIONS = [
  { "text": "Where is the library?", "translation": "图书馆在哪里？" },
  { "text": "我有两个哥哥。", "translation": "I have two brothers." },
  { "text": "The weather is very good today.", "translation": "今天天气很好。" },
  { "text": "你叫什么名字？", "translation": "What's your name?" },
  { "text": "She bought a new car yesterday.", "translation": "她昨天买了一辆新车。" },
  { "text": "我们一起去学校吧。", "translation": "Let's go to school together." }
];

// What other models answer is not known here; these are only places to start.
export const EXAMPLES = {
  translate: TRANSLATIONS.map(({ text }) => text),
  complete: ['The children', '从前有一座山', '春天来了'],
  chat: ['What is a mixture of experts? Answer in one sentence.', '什么是混合专家模型？请用一句话回答。'],
};

/** The second text of a comparison, beside the first example: of the other language, and translated correctly too. */
export const SECOND = {
  translate: TRANSLATIONS[1].text,
  complete: 'The city',
  chat: 'What is a neural network? Answer in one sentence.',
};
